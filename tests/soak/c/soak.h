/* What the verifying workers of the integrity soak share: patterns, records, and the page of counters.
 *
 * The page is a file that the programs of both sides and the test map: one row per worker, written by nobody
 * else. */
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#define ROWS 32

/* What a disk may do to requests while a fault lasts; the test says so before it adds the fault. */
enum { MAY_FAIL = 1, MAY_TEAR = 2 };

struct row {
	char name[24];
	uint64_t rounds, bytes, errors, torn, wrong;
};

struct page {
	uint64_t stop, disk_may;
	struct row row[ROWS];
};

extern struct page *page;

void page_open(const char *path);
struct row *row_named(const char *name);
static inline uint64_t seen(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline void count(uint64_t *p, uint64_t n)
{
	__atomic_store_n(p, *p + n, __ATOMIC_RELEASE);
}
/* A row's worker found what must not be: says it on stderr, counts it. */
__attribute__((format(printf, 2, 3))) void wrong(struct row *row, const char *fmt, ...);
/* A call failed that no fault excuses: ends the program. */
__attribute__((noreturn)) void die(const char *what);

/* Byte i of stream `seed`; i need not be aligned. */
void pattern(void *buf, size_t n, uint64_t seed, uint64_t at);
/* Offset of the first byte that is not as it must be, n: none. */
size_t differs(const void *buf, size_t n, uint64_t seed, uint64_t at);
uint64_t hash(const void *buf, size_t n);
uint64_t dice(uint64_t *state);
char *pages(size_t n);

/* A byte stream over anything: whole buffers or death. */
struct link {
	ssize_t (*send)(int fd, const void *buf, size_t n);
	ssize_t (*recv)(int fd, void *buf, size_t n);
	int fd;
};

extern const struct link tcp_link, scif_link, tty_link;
void put(const struct link *l, const void *buf, size_t n);
void get(const struct link *l, void *buf, size_t n);

/* Both directions of a link at full speed until `stop`, each in a thread; the last record is empty. */
struct duplex {
	struct link link;
	struct row *out, *in;
	uint64_t seed_out, seed_in;
};

void *duplex_out(void *arg);
void *duplex_in(void *arg);

void rma_active(int ep, struct row *row, uint64_t seed);
void rma_passive(int ep);

struct disk_span {
	const char *nbd;
	struct row *row;
	uint64_t seed, first; /* sector */
};

void *disk_work(void *arg);

void console_host(const char *path, const char *command, struct row *row, uint64_t seed);
void console_card(uint64_t seed);
