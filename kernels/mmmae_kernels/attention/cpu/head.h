// One head of one sample, and the functions on it that are compiled once for each instruction set.
//
// Plain structures without member functions: an inline function would be compiled for AVX-512 in one file, and as the linker
// keeps any one copy, be run on CPUs without it. For the same reason level_*.cpp use nothing of the standard library that
// has code, and all they define but their Level is in an unnamed namespace.
#pragma once

#include <cstdint>

namespace mmmae::attention {

constexpr int64_t MAX_WIDTH = 256;

// A block of queries is at most this long and a multiple of ROW_STEP but for the last.
constexpr int64_t MAX_QUERIES = 120, ROW_STEP = 12;

struct Rows {
    const float* data;
    int64_t stride;  // in floats, from row to row
};

struct WritableRows {
    float* data;
    int64_t stride;
};

struct Keys {
    Rows k, v;
    int64_t width;           // of a head
    int64_t total, count;    // all keys, and those present
    const int64_t* present;  // [count], their numbers; null if all are
};

struct Forward {
    Keys keys;
    Rows q;
    WritableRows out;
    float* lse;           // [queries]
    int64_t first, last;  // queries of this task
    int64_t block;        // queries at a time
    bool packed;          // the scratch memory holds these keys already
};

struct Backward {
    Keys keys;
    Rows grad, q, out;
    const float* lse;  // [queries]
    WritableRows grad_q, grad_k, grad_v;
    int64_t queries, block;
};

struct Level {
    const char* name;
    // Floats of scratch memory, which starts at a multiple of 64 bytes.
    int64_t (*forward_scratch)(int64_t keys, int64_t width);
    int64_t (*backward_scratch)(int64_t keys, int64_t width);
    void (*forward)(const Forward& task, float* scratch);
    void (*backward)(const Backward& task, float* scratch);
};

extern const Level level_avx512, level_avx2, level_plain;

}  // namespace mmmae::attention
