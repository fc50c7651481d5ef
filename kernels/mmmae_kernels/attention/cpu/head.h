// Data of one head of one sample, and the functions on it that are compiled for each instruction set.
//
// The structures have no member functions: an inline function would be compiled in several files, and the linker might
// keep the AVX-512 copy for CPUs without it. For the same reason level_*.cpp use no code of the standard library, and
// define everything but their Level in an unnamed namespace.
#pragma once

#include <cstdint>

namespace mmmae::attention {

constexpr int64_t MAX_WIDTH = 256;

// The length of a block of queries is at most MAX_QUERIES and, except for the last block, a multiple of ROW_STEP.
constexpr int64_t MAX_QUERIES = 120, ROW_STEP = 12;

struct Rows {
    const float* data;
    int64_t stride;  // between rows, in floats
};

struct WritableRows {
    float* data;
    int64_t stride;
};

struct Keys {
    Rows k, v;
    int64_t width;           // channels of a head
    int64_t total, count;    // number of all keys, and of present keys
    const int64_t* present;  // [count] numbers of the present keys; null if all are present
};

struct Forward {
    Keys keys;
    Rows q;
    WritableRows out;
    float* lse;           // [queries]
    int64_t first, last;  // queries of this task
    int64_t block;        // queries of a block
    bool packed;          // whether the scratch memory already holds these keys
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
    // Sizes of scratch memory in floats; it has to be aligned to 64 bytes.
    int64_t (*forward_scratch)(int64_t keys, int64_t width);
    int64_t (*backward_scratch)(int64_t keys, int64_t width);
    void (*forward)(const Forward& task, float* scratch);
    void (*backward)(const Backward& task, float* scratch);
};

extern const Level level_avx512, level_avx2, level_plain;

}  // namespace mmmae::attention
