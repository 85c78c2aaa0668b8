// Finds the best tokens of a list, in time linear in its length. Of equal ones, the lower index comes first.
//
// Floats become unsigned integers of the same order. Radix selection finds the largest `count` of them: four passes
// over 8 bits each, each with a histogram. A prefix sum then writes the chosen ones in ascending order. One block does
// all of this.
#pragma once

#include <string.h>

#include "team.h"

namespace ivc {

constexpr int kChooseThreads = 1024;
constexpr int kBins = 256;
constexpr int kNear = 4096;  // so many keys are kept in shared memory
constexpr int kCopies = 8;  // of each counter: most scores share their first bits, so threads would wait for one counter

// An unsigned integer of the same order as the float. Both zeros are equal.
IVC_HD inline uint32_t ordered(float x) {
    const float canonical = x + 0.0f;
    uint32_t bits;
    memcpy(&bits, &canonical, sizeof bits);
    return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

struct Choice {
    uint32_t bins[kBins * kCopies];
    uint64_t warps[kChooseThreads / 32];
    uint32_t nearKeys[kNear];
    int32_t nearFound[kChooseThreads];
    uint32_t threshold;  // the smallest chosen key
    int32_t ties;        // how many of the keys equal to it are chosen
};

// Finds c.threshold and c.ties so that `count` keys are chosen: all above the threshold, and c.ties of those equal to
// it.
IVC_BLOCK void findThreshold(const Team& team, Choice& c, const uint32_t* keys, int32_t length, int32_t count) {
    const auto clear = [&](int thread) {
        for (int i = thread; i < kBins * kCopies; i += team.threads()) c.bins[i] = 0;
    };
    team.each([&](int thread) {
        if (thread == 0) {
            c.threshold = 0;
            c.ties = count;
        }
        clear(thread);
    });
    for (int shift = 24; shift >= 0; shift -= 8) {
        team.each([&](int thread) {
            const uint64_t chosen = static_cast<uint64_t>(c.threshold) >> (shift + 8);
            for (int32_t i = thread; i < length; i += team.threads()) {
                const uint32_t key = keys[i];
                if ((static_cast<uint64_t>(key) >> (shift + 8)) == chosen) {
                    team.add(&c.bins[((key >> shift) & (kBins - 1)) * kCopies + thread % kCopies]);
                }
            }
        });
        // thread t looks at bin kBins - 1 - t, so that the bins above it are those of the threads before it
        Team::Local<uint64_t> above(team);
        Team::Local<uint64_t> here(team);
        Team::Local<uint64_t> wanted(team);
        team.each([&](int thread) {
            uint32_t sum = 0;
            for (int copy = 0; thread < kBins && copy < kCopies; ++copy) {
                sum += c.bins[(kBins - 1 - thread) * kCopies + copy];
            }
            above[thread] = here[thread] = sum;
            wanted[thread] = static_cast<uint64_t>(c.ties);
        });
        team.sumsBefore(above, c.warps);
        team.each([&](int thread) {
            clear(thread);
            if (above[thread] < wanted[thread] && wanted[thread] <= above[thread] + here[thread]) {
                c.threshold |= static_cast<uint32_t>(kBins - 1 - thread) << shift;
                c.ties = static_cast<int32_t>(wanted[thread] - above[thread]);
            }
        });
    }
}

// Calls take(i, slot) for each chosen key i in ascending order, with slots from 0 on, and leave(i) for each other key.
template <class Take, class Leave>
IVC_BLOCK void takeChosen(
    const Team& team, Choice& c, const uint32_t* keys, int32_t length, Take take, Leave leave) {
    const int32_t share = ceilDiv(length, team.threads());
    const auto begin = [&](int thread) { return smaller(thread * share, length); };
    Team::Local<uint64_t> before(team);  // keys above the threshold, and in the lower 32 bits those equal to it
    team.each([&](int thread) {
        uint64_t sum = 0;
        for (int32_t i = begin(thread); i < begin(thread + 1); ++i) {
            sum += static_cast<uint64_t>(keys[i] > c.threshold) << 32 | static_cast<uint64_t>(keys[i] == c.threshold);
        }
        before[thread] = sum;
    });
    team.sumsBefore(before, c.warps);
    team.each([&](int thread) {
        int32_t equal = static_cast<int32_t>(before[thread] & 0xffffffffu);
        int32_t slot = static_cast<int32_t>(before[thread] >> 32) + smaller(equal, c.ties);
        for (int32_t i = begin(thread); i < begin(thread + 1); ++i) {
            if (keys[i] > c.threshold || (keys[i] == c.threshold && equal++ < c.ties)) {
                take(i, slot++);
            } else {
                leave(i);
            }
        }
    });
}

// Scratch memory for `length` keys: in shared memory if they fit.
IVC_BLOCK uint32_t* keysNear(Choice& c, uint32_t* scratch, int32_t length) { return length <= kNear ? c.nearKeys : scratch; }

// The seeds: the `count` best of querySums, best first. scratchKeys, scratchFound: [visual] and [count].
IVC_BLOCK void chooseSeeds(const Team& team, Choice& c, const float* querySums, int32_t visual, int32_t count,
    uint32_t* scratchKeys, int32_t* scratchFound, int32_t* seedIndex) {
    uint32_t* const keys = keysNear(c, scratchKeys, visual);
    int32_t* const found = count <= kChooseThreads ? c.nearFound : scratchFound;
    team.each([&](int thread) {
        for (int32_t i = thread; i < visual; i += team.threads()) keys[i] = ordered(querySums[i]);
    });
    findThreshold(team, c, keys, visual, count);
    takeChosen(
        team, c, keys, visual, [&](int32_t i, int32_t slot) { found[slot] = i; }, [](int32_t) {});
    team.each([&](int thread) {
        for (int32_t i = thread; i < count; i += team.threads()) {
            const uint32_t own = keys[found[i]];
            int32_t rank = 0;  // found is ascending, so an equal key before has the lower index
            for (int32_t j = 0; j < count; ++j) rank += keys[found[j]] > own || (keys[found[j]] == own && j < i);
            seedIndex[rank] = found[i];
        }
    });
}

}  // namespace ivc
