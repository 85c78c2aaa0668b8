// Prints what samples/cpp/plan.h plans: plan MANIFEST START RATIO ROWS COLUMNS TOKEN..; ROWS 0 for no picture.
#include "plan.h"

#include <iostream>

template <class T>
void print(const std::vector<T>& values) {
    for (const T value : values) std::cout << value << " ";
    std::cout << "\n";
}

int main(int count, char** words) try {
    const Json manifest = Json::read(words[1]);
    const Grid grid{std::stoi(words[4]), std::stoi(words[5])};
    std::vector<int32_t> tokens;
    for (int i = 6; i < count; ++i) tokens.push_back(std::stoi(words[i]));
    const Plan plan =
        planRun(manifest, tokens, grid.rows > 0 ? &grid : nullptr, std::stoi(words[2]), std::stod(words[3]));
    print(plan.positionIds);
    print(plan.visualIndex);
    print(plan.textIndex);
    print(plan.queryIndex);
    print(plan.priority);
    print(std::vector<int32_t>{plan.keepCount, plan.nextPosition});
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
}
