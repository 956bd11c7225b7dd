// Uninitialised, aligned memory for a call. Freed blocks are held for the next call, 32 MiB in all: taking them anew
// from the system costs a page fault for each 4 KiB, which is a third of the time at N = 256. Larger blocks ask for
// huge pages and go back at once, except for one that the next call is likely to want: it is lent to the system, which
// takes its pages only when it runs short. At N = 4096 that saves a tenth of the time. It counts as resident until
// then.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <new>

namespace fntx {

// At least `bytes`, aligned to a cache line; throws std::bad_alloc. `capacity` is what release_memory needs to know.
void* acquire_memory(size_t bytes, size_t& capacity);
void release_memory(void* memory, size_t capacity);
void lend_memory(void* memory, size_t capacity);  // released, but a next call of the same size may find it

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

    // Release it, for a next call of the same size to find.
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
