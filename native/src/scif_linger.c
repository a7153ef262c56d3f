/* Looking at the node queues before the node sleeps (mic_emu/scif/linger.py). */
#define _GNU_SOURCE
#include <poll.h>
#include <stdlib.h>

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

int mic_scif_linger(struct mic_linger *s, struct mic_scif_rx *const *rx, int n, int work)
{
	struct pollfd other = {.fd = work, .events = POLLIN};

	do {
		for (int i = 0; i < n; i++) {
			if (mic_load_relaxed(rx[i]->windex) == rx[i]->read)
				continue;
			mic_linger_hit(s);
			return i;
		}
		if (poll(&other, 1, 0) > 0) {
			s->begun = 0; /* neither found nor in vain */
			return -1;
		}
	} while (mic_linger_again(s));
	return -1;
}
