// Memory for gradients, used again. A fresh page costs a page fault and a clearing by the system, several times what
// the kernel needs to fill it: 512 MB of fresh memory took 400 ms to write where used memory took 35.
//
// A freed buffer is kept for the next call instead of going back to the system. Kept are at most two buffers and
// `limit` bytes (an eighth of the machine's memory, if nobody says otherwise); `release` gives them back.
#pragma once

#include <cstdint>

namespace objkern::cpu {

constexpr int64_t kLeastReused = 1 << 20;  // bytes; smaller requests are the ordinary allocator's business

void* acquire_buffer(int64_t bytes);  // aligned to a page; null if there is no memory
void return_buffer(void* buffer);

void release_buffers();
int64_t kept_bytes();
int64_t buffer_limit();
void set_buffer_limit(int64_t bytes);  // 0 keeps nothing

}  // namespace objkern::cpu
