// Detection of the instructions of bfloat.h, which both the processor and the operating system must support.
#pragma once

#include <cpuid.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fntx {

#ifdef FNTX_EMULATE
inline bool has_avx512_bf16() { return true; }
inline bool has_amx() { return true; }
#else

struct Registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Return the registers of a CPUID leaf, or zeros if there is no such leaf.
inline Registers cpuid(uint32_t leaf, uint32_t part) {
    Registers found;
    __get_cpuid_count(leaf, part, &found.eax, &found.ebx, &found.ecx, &found.edx);
    return found;
}

inline bool has_avx512_bf16() { return cpuid(7, 0).eax >= 1 && cpuid(7, 1).eax >> 5 & 1; }

// On Linux, a process must request permission to use the tile registers. Other systems are not supported.
inline bool has_amx() {
#ifdef __linux__
    constexpr uint32_t AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, OSXSAVE = 1u << 27, TILES = 3u << 17;
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arguments of arch_prctl, since Linux 5.16
    if ((cpuid(7, 0).edx & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return false;
    if (!(cpuid(1, 0).ecx & OSXSAVE)) return false;
    uint32_t enabled, high;
    __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
    if ((enabled & TILES) != TILES || !has_avx512_bf16()) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

#endif

}  // namespace fntx
