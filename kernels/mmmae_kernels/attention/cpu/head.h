// Data of one head of one sample, and the functions on it that are compiled for each instruction set.
//
// The structures have no member functions: an inline function would be compiled in several files, and the linker might
// keep the AVX-512 copy for CPUs without it. For the same reason level_*.cpp use no code of the standard library, and
// define everything but their Level in an unnamed namespace.
#pragma once

#include <cstdint>

namespace mmmae::attention {

struct Bfloat16 {
    uint16_t bits;
};

// T is the type of queries, keys, values, the result and the gradients: float or Bfloat16.
template <class T> struct Rows {
    const T* data;
    int64_t stride;  // between rows, in elements
};

template <class T> struct WritableRows {
    T* data;
    int64_t stride;
};

template <class T> struct Keys {
    Rows<T> k, v;
    int64_t width;           // channels of a head
    int64_t total, count;    // number of all keys, and of present keys
    const int64_t* present;  // [count] numbers of the present keys; null if all are present
};

template <class T> struct Forward {
    Keys<T> keys;
    Rows<T> q;
    WritableRows<T> out;
    float* lse;           // [queries]
    int64_t first, last;  // queries of this task
    int64_t block;        // queries of a block
    bool packed;          // whether the scratch memory already holds these keys
};

template <class T> struct Backward {
    Keys<T> keys;
    Rows<T> grad, q, out;
    const float* lse;  // [queries]
    WritableRows<T> grad_q, grad_k, grad_v;
    int64_t queries, block;
};

template <class T> struct Level {
    const char* name;
    // The length of a block of queries is at most max_queries and, except for the last block, a multiple of row_step.
    int64_t max_queries, row_step;
    // Sizes of scratch memory in floats; it has to be aligned to 64 bytes.
    int64_t (*forward_scratch)(int64_t keys, int64_t width);
    int64_t (*backward_scratch)(int64_t keys, int64_t width);
    void (*forward)(const Forward<T>& task, float* scratch);
    void (*backward)(const Backward<T>& task, float* scratch);
};

extern const Level<float> level_avx512, level_avx2, level_plain;

// Products of bfloat16 by tiles, by dot products of pairs, by a model of the tiles for the tests, and by float32.
extern const Level<Bfloat16> level_amx, level_dot, level_model;
extern const Level<Bfloat16> level_avx512_widening, level_avx2_widening, level_plain_widening;

}  // namespace mmmae::attention
