/* The only place with memory order. Nobody else includes <stdatomic.h>, writes a fence or `volatile`.
 *
 * Every use names its partner: "pairs with the release store in ...". Shared memory is read
 * exactly once through these accessors; what was read is then checked and used from a local. */
#ifndef MIC_BARRIER_H
#define MIC_BARRIER_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define mic_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
/* For "I published, now does the other side sleep?": ordered after an earlier read-modify-write. */
#define mic_load_seq_cst(p)     __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define mic_load_relaxed(p)     __atomic_load_n((p), __ATOMIC_RELAXED)
#define mic_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define mic_store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define mic_fetch_or(p, v)      __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST)
#define mic_fetch_and(p, v)     __atomic_fetch_and((p), (v), __ATOMIC_SEQ_CST)
#define mic_fetch_add(p, v)     __atomic_fetch_add((p), (v), __ATOMIC_SEQ_CST)
#define mic_exchange(p, v)      __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
#define mic_cas(p, old, v)      __atomic_compare_exchange_n((p), (old), (v), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
/* A counter with one writer, whom other threads may watch. */
#define mic_count(p, n) mic_store_relaxed((p), *(p) + (n))
/* Orders an earlier store before a later load: needed before "does the peer sleep?" is asked. */
#define mic_full_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/* Orders this thread's stores for its own signal handlers; costs nothing. */
#define mic_signal_fence() __atomic_signal_fence(__ATOMIC_SEQ_CST)

/* A private copy of shared bytes that the compiler cannot replace by later reads of the original. */
static inline void mic_copy_once(void *dst, const void *src, size_t len)
{
	memcpy(dst, src, len);
	__asm__ __volatile__("" : : "r"(dst) : "memory");
}
#define mic_timestamp() __builtin_ia32_rdtsc()

static inline void mic_cpu_relax(void)
{
	__builtin_ia32_pause();
}

#endif
