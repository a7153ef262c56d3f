/* What a node waits for, and looking at the node queues before it sleeps (mic_emu/scif/events.py). */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>

#include "mic/barrier.h"
#include "mic/linger.h"
#include "mic/scif_ring.h"

struct mic_linger *mic_scif_linger_new(unsigned us)
{
	struct mic_linger *s = malloc(sizeof *s);

	if (s)
		mic_linger_init(s, us);
	return s;
}

void mic_scif_linger_free(struct mic_linger *s)
{
	free(s);
}

static int take_ready(int epfd, int fds[MIC_SCIF_EVENTS])
{
	struct epoll_event events[MIC_SCIF_EVENTS];
	int n = epoll_wait(epfd, events, MIC_SCIF_EVENTS, 0);

	for (int i = 0; i < n; i++)
		fds[i] = events[i].data.fd;
	return n;
}

int mic_scif_events(struct mic_linger *s, struct mic_scif_rx *const *rx, int n, int epfd,
		    int fds[MIC_SCIF_EVENTS], int *ring)
{
	*ring = -1;
	do {
		for (int i = 0; i < n; i++) {
			if (mic_load_relaxed(rx[i]->windex) == rx[i]->read)
				continue;
			mic_linger_hit(s);
			*ring = i;
			return 0;
		}
		int ready = take_ready(epfd, fds);

		if (ready != 0) {
			s->begun = 0; /* neither found nor in vain */
			return ready > 0 ? ready : 0;
		}
	} while (n && mic_linger_again(s));
	return 0;
}
