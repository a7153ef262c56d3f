/* Adds, reconfigures and removes a device of type 42, argv[2] times; a file of its own each time. */
#include <mic_vop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int once(const char *path, char *config)
{
	struct mic_vop_device device = {42, 2, 8, 0, config, 4};
	struct mic_vop *f = mic_vop_open(path);
	int rc = -1, news = 1;

	if (!f || mic_vop_add(f, &device) < 0) {
		perror("churn: the device is not announced");
		goto out;
	}
	while (news > 0 && !mic_vop_driver_ok(f))
		news = mic_vop_wait(f, 20000, -1);
	if (news < 0)
		perror("churn: waiting for the card's driver");
	if (news == 0)
		fprintf(stderr, "churn: the card's driver does not come up within 20 s\n");
	if (news <= 0)
		goto out;
	config[0]++;
	switch (mic_vop_set_config(f, config)) {
	case 1:
		rc = 0;
		break;
	case 0:
		fprintf(stderr, "churn: the card does not acknowledge the configuration\n");
		break;
	default:
		perror("churn: the configuration");
	}
out:
	mic_vop_close(f);
	return rc;
}

int main(int argc, char **argv)
{
	char config[4] = "abc";

	for (int i = 0; argc == 3 && i < atoi(argv[2]); i++)
		if (once(argv[1], config) < 0)
			return 1;
	return argc != 3;
}
