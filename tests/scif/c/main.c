#include "t.h"

struct test *tests;

int main(int argc, char **argv)
{
	alarm(55);
	signal(SIGPIPE, SIG_DFL);
	for (struct test *t = tests; t; t = t->next) {
		if (argc < 2) {
			puts(t->name);
		} else if (!strcmp(argv[1], t->name)) {
			on_node(node_a());
			t->run();
			return 0;
		}
	}
	return argc < 2 ? 0 : 2;
}
