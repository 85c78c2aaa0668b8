// Prints what the program computes on the host:
//
//   plan MANIFEST START RATIO ROWS COLUMNS TOKEN..   the plan of a run; ROWS 0 for no picture
//   plan --bundle FOLDER TOKEN..                     a whole bundle's embeddings of these tokens
//   plan --logits LOGIT..                            the most probable token, -1 for none
//   plan --count EXTENT..                            values of a tensor
#include <iostream>

#include "embeddings.h"
#include "manifest.h"
#include "plan.h"
#include "sizes.h"

template <class T>
void print(const std::vector<T>& values) {
    for (const T value : values) std::cout << value << " ";
    std::cout << "\n";
}

int main(int count, char** words) try {
    const std::string what = words[1];
    const std::vector<std::string> rest(words + 2, words + count);
    if (what == "--bundle") {
        const Json manifest = readManifest(rest.at(0));
        const Embeddings embeddings(rest.at(0), manifest);
        std::vector<int32_t> tokens;
        for (size_t i = 1; i < rest.size(); ++i) tokens.push_back(std::stoi(rest[i]));
        std::cout.precision(9);
        print(embeddings.rows(tokens));
        print(std::vector<int64_t>{pixelCount(manifest, {2, 3})});
    } else if (what == "--logits") {
        std::vector<float> logits;
        for (const std::string& logit : rest) logits.push_back(std::stof(logit));
        std::cout << mostProbable(logits.data(), logits.size()) << "\n";
    } else if (what == "--count") {
        Shape shape;
        for (const std::string& extent : rest) shape.push_back(std::stoll(extent));
        std::cout << ::count(shape) << "\n";
    } else {
        const Json manifest = Json::read(what);
        checkManifest(manifest);
        const Grid grid{std::stoi(rest.at(2)), std::stoi(rest.at(3))};
        std::vector<int32_t> tokens;
        for (size_t i = 4; i < rest.size(); ++i) tokens.push_back(std::stoi(rest[i]));
        const Plan plan =
            planRun(manifest, tokens, grid.rows > 0 ? &grid : nullptr, std::stoi(rest.at(0)), std::stod(rest.at(1)));
        print(plan.positionIds);
        print(plan.visualIndex);
        print(plan.textIndex);
        print(plan.queryIndex);
        print(plan.priority);
        print(std::vector<int32_t>{plan.keepCount, plan.nextPosition});
    }
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
}
