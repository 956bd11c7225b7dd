// Uninitialised, aligned memory for a call. Up to 32 MiB of freed blocks are held for the next call, because fresh
// memory from the system costs a page fault per 4 KiB. Without held blocks, page faults would take a third of the time
// of a call at N = 256. Blocks of 4 MiB and more request huge pages. Blocks of more than 32 MiB are freed at once. On
// Linux there is one exception: a block that the next call probably needs is lent to the system. The system may reclaim
// the block's pages, but does so only under memory pressure; until then, the pages count as resident memory. Lending
// saves a tenth of the time of a call at N = 4096.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <new>

namespace fntx {

// Return a block of at least `bytes` bytes, aligned to a cache line, or throw std::bad_alloc. Set `capacity` to the
// block's size, which release_memory and lend_memory need.
void* acquire_memory(size_t bytes, size_t& capacity);
void release_memory(void* memory, size_t capacity);
// Release the memory, but let a later call reuse it for a block of about the same size.
void lend_memory(void* memory, size_t capacity);

template <class T> class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t size) {
        if (size < 0 || uint64_t(size) > uint64_t(PTRDIFF_MAX) / sizeof(T)) throw std::bad_alloc();
        data_ = static_cast<T*>(acquire_memory(size_t(size) * sizeof(T), capacity_));
    }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        Buffer old;
        old.swap(*this);
        swap(other);
        return *this;
    }
    ~Buffer() {
        if (data_) release_memory(data_, capacity_);
    }

    // Release the memory, but let a later call reuse it for a block of about the same size.
    void lend() {
        if (data_) lend_memory(data_, capacity_);
        data_ = nullptr;
    }

    operator T*() const { return data_; }

  private:
    void swap(Buffer& other) noexcept {
        T* const data = data_;
        const size_t capacity = capacity_;
        data_ = other.data_, capacity_ = other.capacity_;
        other.data_ = data, other.capacity_ = capacity;
    }

    T* data_ = nullptr;
    size_t capacity_ = 0;
};

}  // namespace fntx
