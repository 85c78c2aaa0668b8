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
    uint32_t above[kBins + 1];
    int32_t before[2][kChooseThreads];
    uint32_t threshold;  // the smallest chosen key
    int32_t ties;        // how many of the keys equal to it are chosen
    int32_t wanted;
};

// Exclusive prefix sum of one number per thread. The result is before[return value][thread].
IVC_BLOCK int prefixSum(const Team& team, Choice& c) {
    int from = 0;  // which half holds the inclusive sums so far
    for (int step = 1; step < team.threads(); step *= 2) {
        team.each([&](int thread) {
            c.before[1 - from][thread] = c.before[from][thread] + (thread >= step ? c.before[from][thread - step] : 0);
        });
        from = 1 - from;
    }
    team.each([&](int thread) { c.before[1 - from][thread] = thread ? c.before[from][thread - 1] : 0; });
    return 1 - from;
}

// Finds c.threshold and c.ties so that `count` keys are chosen: all above the threshold, and c.ties of those equal to
// it.
IVC_BLOCK void findThreshold(const Team& team, Choice& c, const uint32_t* keys, int32_t length, int32_t count) {
    team.each([&](int thread) {
        if (thread == 0) {
            c.threshold = 0;
            c.wanted = count;
        }
    });
    for (int shift = 24; shift >= 0; shift -= 8) {
        team.each([&](int thread) {
            for (int i = thread; i < kBins * kCopies; i += team.threads()) c.bins[i] = 0;
        });
        team.each([&](int thread) {
            const uint64_t chosen = static_cast<uint64_t>(c.threshold) >> (shift + 8);
            for (int32_t i = thread; i < length; i += team.threads()) {
                const uint32_t key = keys[i];
                if ((static_cast<uint64_t>(key) >> (shift + 8)) == chosen) {
                    team.add(&c.bins[((key >> shift) & (kBins - 1)) * kCopies + thread % kCopies]);
                }
            }
        });
        team.each([&](int thread) {
            if (thread > kBins) return;
            uint32_t sum = 0;
            for (int copy = 0; thread < kBins && copy < kCopies; ++copy) sum += c.bins[thread * kCopies + copy];
            c.above[thread] = sum;
        });
        Team::Local<uint32_t> next(team);
        for (int step = 1; step < kBins; step *= 2) {  // above[b] becomes the number of keys in bins >= b
            team.each([&](int thread) {
                if (thread < kBins) next[thread] = c.above[thread] + (thread + step < kBins ? c.above[thread + step] : 0);
            });
            team.each([&](int thread) {
                if (thread < kBins) c.above[thread] = next[thread];
            });
        }
        Team::Local<int32_t> wanted(team);
        team.each([&](int thread) { wanted[thread] = c.wanted; });
        team.each([&](int thread) {
            if (thread >= kBins) return;
            const int32_t here = static_cast<int32_t>(c.above[thread]);
            const int32_t over = static_cast<int32_t>(c.above[thread + 1]);
            if (over < wanted[thread] && wanted[thread] <= here) {
                c.threshold |= static_cast<uint32_t>(thread) << shift;
                c.wanted = wanted[thread] - over;
            }
        });
    }
    team.each([&](int thread) {
        if (thread == 0) c.ties = c.wanted;
    });
}

// Calls take(i, slot) for each chosen key i in ascending order, with slots from 0 on, and leave(i) for each other key.
template <class Take, class Leave>
IVC_BLOCK void takeChosen(
    const Team& team, Choice& c, const uint32_t* keys, int32_t length, Take take, Leave leave) {
    const int32_t share = ceilDiv(length, team.threads());
    const auto begin = [&](int thread) { return smaller(thread * share, length); };
    Team::Local<int32_t> tied(team);
    team.each([&](int thread) {
        int32_t equal = 0;
        for (int32_t i = begin(thread); i < begin(thread + 1); ++i) equal += keys[i] == c.threshold;
        c.before[0][thread] = equal;
    });
    const int ties = prefixSum(team, c);
    team.each([&](int thread) { tied[thread] = c.before[ties][thread]; });
    team.each([&](int thread) {
        int32_t above = 0, equal = tied[thread];
        for (int32_t i = begin(thread); i < begin(thread + 1); ++i) {
            above += keys[i] > c.threshold || (keys[i] == c.threshold && equal++ < c.ties);
        }
        c.before[0][thread] = above;
    });
    const int slots = prefixSum(team, c);
    team.each([&](int thread) {
        int32_t slot = c.before[slots][thread], equal = tied[thread];
        for (int32_t i = begin(thread); i < begin(thread + 1); ++i) {
            if (keys[i] > c.threshold || (keys[i] == c.threshold && equal++ < c.ties)) {
                take(i, slot++);
            } else {
                leave(i);
            }
        }
    });
}

// The seeds: the `count` best of querySums, best first. keys, found: scratch [visual] and [count].
IVC_BLOCK void chooseSeeds(const Team& team, Choice& c, const float* querySums, int32_t visual, int32_t count,
    uint32_t* keys, int32_t* found, int32_t* seedIndex) {
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
