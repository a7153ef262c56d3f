/* A node follows its programs to their CPU.
 *
 * A request and its answer go to and fro between two processes of which only one runs at a time. On one CPU
 * that costs a switch; on two, each half wakes a CPU that has gone to sleep. The kernel would bring the two
 * together, but not while the CPU on which the node slept is idle, and that is what it always is then: a pair
 * that is apart stays apart. With two programs and two nodes on two CPUs a connection takes half as long
 * again when each node sits beside the other's program. (Network cards are told the like by their receive
 * flow steering.) It is a hint: once there, the scheduler may do as it likes. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdbool.h>

#include "mic/scif_abi.h"

#define ROW  8         /* programs on several CPUs do not pull at it in turn */
#define REST 20000000u /* ns: 30 us for a move are then too little to matter */

int mic_scif_steer(struct mic_scif_steer *s, uint64_t cpu, int here, uint64_t now)
{
	bool elsewhere = cpu > 0 && cpu <= CPU_SETSIZE && (int)cpu - 1 != here;

	s->row = !elsewhere ? 0 : cpu == s->cpu ? s->row + 1 : 1;
	s->cpu = cpu;
	if (s->row < ROW || now - s->when < REST)
		return -1;
	s->row = 0;
	s->when = now;
	return (int)cpu - 1;
}

int mic_scif_go_to(int cpu)
{
	cpu_set_t all, one;

	if (sched_getaffinity(0, sizeof all, &all) < 0)
		return -errno;
	if (cpu < 0 || cpu >= CPU_SETSIZE || !CPU_ISSET(cpu, &all))
		return -EINVAL;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	if (sched_setaffinity(0, sizeof one, &one) < 0)
		return -errno;
	return sched_setaffinity(0, sizeof all, &all) < 0 ? -errno : 0;
}
