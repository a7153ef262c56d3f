/* One process's view of one card: its memories, its register file and its interrupt lines.
 *
 * A doorbell is the register bit of the specification plus an eventfd, as with MSI-X vectors; the
 * process that writes the register also signals the line. No lock is shared between processes:
 * registers change by single atomic operations only. */
#ifndef MIC_BUS_H
#define MIC_BUS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "mic/layout_gen.h"

/* cffi-begin */
/* Order of the descriptors that mic_bus_attach() takes. */
enum mic_bus_fd {
	MIC_FD_GDDR,            /* BAR 0: offset = card physical address; see mic_gddr_size() */
	MIC_FD_MMIO,            /* BAR 4 */
	MIC_FD_HOST,            /* host memory: offset = host bus address */
	MIC_FD_CONFIG,          /* PCI configuration space */
	MIC_FD_FAULTS,          /* fault filters (mic/fault.h); -1: there are none */
	MIC_FD_RESET,           /* eventfd: RGCR bit 0 was written */
	MIC_FD_BOOT,            /* eventfd: the bootstrap interrupt */
	MIC_FD_VEC,             /* 16 eventfds: interrupts to the host, by vector */
	MIC_FD_IRQ = 23,        /* 20 eventfds: interrupts to the card: doorbells 0-15, DMA channels 4-7 */
	MIC_FD_CHAN = 43,       /* 8 eventfds: DMA channel c has something to do */
	MIC_FD_FAULT_HIT = 51,  /* eventfd: a fault filter acted; the host reads it */
	MIC_FD_FAULT_LATE = 52, /* eventfd: a doorbell is on its way; the board reads it */
	MIC_FD_COUNT = 53
};

struct mic_bus;

/* Map a card. `fds` has MIC_FD_COUNT open descriptors; the caller keeps them open (they are used by
 * number) and closes them after mic_bus_detach(). Memory sizes are taken from the descriptors.
 * Returns NULL with errno set when a mapping fails. */
struct mic_bus *mic_bus_attach(const int *fds);
void mic_bus_detach(struct mic_bus *bus);

/* The card's memory is another object from now on: a new generation after a reset. It takes the place of
 * the old one in this process's mapping and descriptor; `fd` stays the caller's. 0, -EINVAL (another
 * size): nothing has changed, another -errno: it may be done in part, and such a bus is good for nothing. */
int mic_bus_replace_gddr(struct mic_bus *bus, int fd);
/* Let mic_card_at() reach the window bank (the DMA engine); its accesses must be guarded. 0 or -errno. */
int mic_bus_map_bank(struct mic_bus *bus);

/* Register access; `off` is in bytes from the start of BAR 4. Unknown registers read 0 and ignore
 * writes, which are counted (HW-4). A write does what the hardware does: cause bits, doorbells,
 * reset and boot interrupts, DMA kicks. */
uint32_t mic_mmio_read(struct mic_bus *bus, uint32_t off);
void mic_mmio_write(struct mic_bus *bus, uint32_t off, uint32_t value);
uint64_t mic_mmio_ignored(struct mic_bus *bus);

/* Registers as the hardware itself changes them, for the board process only. */
void mic_hw_store(struct mic_bus *bus, uint32_t off, uint32_t value);
void mic_hw_reset(struct mic_bus *bus);

/* The engine's side of a channel: raise the completion interrupt of channel `c` towards its owner
 * (masked: it waits for the unmasking, HW-35), and halt it with a DCHERR bit (HW-31). */
void mic_hw_dma_interrupt(struct mic_bus *bus, unsigned c);
void mic_hw_dma_fault(struct mic_bus *bus, unsigned c, uint32_t error);
/* Sleep while DSTAT of channel `c` is `seen`, at most `timeout_ns`, until its count is `count`, the
 * channel goes idle or it halts; may return early. MIC_DMA_SLEEP_ANY: until it changes at all. */
void mic_dma_sleep(struct mic_bus *bus, unsigned c, uint32_t seen, uint32_t count, uint64_t timeout_ns);
/* The engine's side: the count has become `count`; MIC_DMA_SLEEP_ANY: idle or halted. */
void mic_hw_dma_wake(struct mic_bus *bus, unsigned c, uint32_t count);
/* DCR holds bits of both sides' channels: change some of them in one step. Wakes the engine. */
void mic_dcr_update(struct mic_bus *bus, uint32_t clear, uint32_t set);

/* Interrupts to the host follow the mode that configuration space shows: MSI-X with its table and
 * pending bits, MSI (vector 0, MXAR0), INTx (vector 0), none while bus mastering or INTx is off. A
 * card without configuration space (vendor id 0) delivers as MSI-X without masks.
 * mic_raise_host() sets cause bits (source offsets, HW 4.2) and delivers those that are
 * enabled; mic_raise_card() signals card line `irq` (index of the MIC_FD_IRQ row). */
void mic_raise_host(struct mic_bus *bus, uint32_t sources);
void mic_raise_card(struct mic_bus *bus, unsigned irq);
/* The card rings host doorbell `db`; numbers that do not exist are ignored (HW-18). `source` is the fault
 * target on whose behalf it rings: a device's offset in the device page, MIC_FAULT_TARGET_SCIF, or 0. */
void mic_ring_host(struct mic_bus *bus, int db, uint32_t source);
/* The host rings card doorbell `db` (0-7 APICICR, 8-15 RDMASR); others are ignored (HW-18). */
void mic_ring_card(struct mic_bus *bus, int db, uint32_t source);

/* This process is the host: while the command register has memory decoding off, or the function
 * sleeps (D3hot), registers read all ones and ignore writes. Not for the aperture, which is mapped. */
void mic_bus_set_over_pci(struct mic_bus *bus, bool on);
/* Configuration space was written: deliver what became possible. */
void mic_bus_config_changed(struct mic_bus *bus);

/* May the function reach host memory now? False while bus mastering is off. */
bool mic_bus_master(struct mic_bus *bus);
/* Descriptor number `which` (enum mic_bus_fd) of this process. */
int mic_bus_fd(struct mic_bus *bus, unsigned which);

/* Memories. Sizes in bytes. */
uint8_t *mic_bus_gddr(struct mic_bus *bus);
uint64_t mic_bus_gddr_size(struct mic_bus *bus);
uint8_t *mic_bus_host(struct mic_bus *bus);
uint64_t mic_bus_host_size(struct mic_bus *bus);
uint8_t *mic_bus_mmio(struct mic_bus *bus);
uint8_t *mic_bus_config(struct mic_bus *bus); /* MIC_CONFIG_SIZE bytes */
uint8_t *mic_bus_faults(struct mic_bus *bus); /* MIC_FAULT_SIZE bytes */

/* Pointer to `len` bytes of GDDR at card physical `addr`, NULL when any byte is outside. */
void *mic_gddr_at(struct mic_bus *bus, uint64_t addr, uint64_t len);
/* The same for an address as the card sees it: GDDR, or host memory through the SMPT (HW-11).
 * NULL when the range is outside or crosses an SMPT entry boundary. */
void *mic_card_at(struct mic_bus *bus, uint64_t addr, uint64_t len);

/* A GDDR object has the card's memory at [0, size), then nothing, then the window bank at
 * [MIC_WINDOW_BANK, MIC_WINDOW_BANK + size), which no bus maps. Bytes of card memory in an object of
 * `object_size` bytes, with or without its bank. */
uint64_t mic_gddr_size(uint64_t object_size);
/* Cut the bank off a GDDR object, for ever: every mapping of it faults with SIGBUS from now on. 0, -errno. */
int mic_gddr_revoke(int fd);
/* Write `len` bytes, at most 8, at offset `off` of a memory object; 8 aligned ones are never torn. 0, -EIO
 * (there is no memory any more), -errno. */
int mic_shm_write_at(int fd, uint64_t off, const void *data, size_t len);

/* Single accesses to shared memory; size is 1, 2, 4 or 8 bytes. Loads acquire, stores release. */
uint64_t mic_shm_load(const void *p, unsigned size);
void mic_shm_store(void *p, unsigned size, uint64_t value);
void mic_shm_fence(void);
/* 0 or -errno: give the pages of [off, off + len) back to the system. */
int mic_punch(int fd, uint64_t off, uint64_t len);
/* 0 or -errno: reserve them, so that a later store cannot fault (ENOSPC: /dev/shm is full; some of them may
 * be reserved then). Never makes the object larger: what was cut off stays cut off. No signal ends it. */
int mic_reserve(int fd, uint64_t off, uint64_t len);
/* A new eventfd at 0: descriptor or -errno. */
int mic_eventfd(int flags);
/* cffi-end */

#endif
