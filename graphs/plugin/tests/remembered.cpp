// What Remembered finds and forgets; prints nothing where all is so.
#include "../kernels/remembered.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int kMost = 100;

struct Squares {
    int get(int number) {
        return squares.get(number, [&] {
            ++found;
            return number * number;
        });
    }

    ivc::Remembered<int, int, kMost> squares;
    std::atomic<int> found{0};
};

void require(bool fact, const char* what) {
    if (fact) return;
    std::fprintf(stderr, "it is not so that %s\n", what);
    std::exit(1);
}

}  // namespace

int main() {
    Squares all;
    for (int i = 0; i < 100 * kMost; ++i) {
        require(all.get(i) == i * i, "what is found is what is given");
        const int before = all.found;
        for (int last = i < kMost ? 0 : i - kMost + 1; last <= i; ++last) all.get(last);
        require(all.found == before, "the last keys are known");
    }
    const int before = all.found;
    for (int i = 0; i < 10 * kMost; ++i) all.get(i);
    require(all.found == before + 10 * kMost, "keys of long ago are forgotten");

    Squares often;
    for (int i = 0; i < 100 * kMost; ++i) {
        often.get(-1);
        often.get(i);
    }
    require(often.found == 100 * kMost + 1, "a key that is asked for again and again stays");

    Squares shared;
    std::atomic<bool> right{true};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; ++thread) {
        threads.emplace_back([&, thread] {
            for (int i = 0; i < 20 * kMost; ++i) {
                const int number = (i * 7 + thread) % (3 * kMost);
                if (shared.get(number) != number * number) right = false;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    require(right, "threads get what is right");
    return 0;
}
