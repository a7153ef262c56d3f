/* A test program: TEST(name) { ... CHECK(...); }. Each test has a time limit; the exit
 * status is the number of tests that failed. `program name` runs one test. */
#ifndef MIC_TEST_HARNESS_H
#define MIC_TEST_HARNESS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct test {
	const char *name;
	void (*run)(void);
	struct test *next;
};

static struct test *tests, **last_test = &tests;
static int failures;

#define TEST(id)                                                                                             \
	static void id(void);                                                                                \
	static struct test id##_test = {#id, id, NULL};                                                      \
	__attribute__((constructor)) static void id##_add(void)                                              \
	{                                                                                                    \
		*last_test = &id##_test;                                                                     \
		last_test = &id##_test.next;                                                                 \
	}                                                                                                    \
	static void id(void)

#define CHECK_OR_RETURN(cond, value)                                                                         \
	do {                                                                                                 \
		if (!(cond)) {                                                                               \
			printf("%s:%d: %s\n", __FILE__, __LINE__, #cond);                                    \
			__atomic_fetch_add(&failures, 1, __ATOMIC_SEQ_CST);                                  \
			return value;                                                                        \
		}                                                                                            \
	} while (0)
/* Fails the test and leaves it; in a thread function, ends the thread. */
#define CHECK(cond)           CHECK_OR_RETURN(cond, )
#define CHECK_IN_THREAD(cond) CHECK_OR_RETURN(cond, NULL)

#define TEST_LIMIT_S 120

int main(int argc, char **argv)
{
	int failed = 0;

	setvbuf(stdout, NULL, _IONBF, 0);
	for (struct test *t = tests; t; t = t->next) {
		if (argc > 1 && strcmp(argv[1], t->name))
			continue;
		failures = 0;
		alarm(TEST_LIMIT_S); /* a test that hangs dies, and the runner sees the signal */
		t->run();
		alarm(0);
		printf("%s %s\n", failures ? "FAIL" : "ok  ", t->name);
		failed += failures != 0;
	}
	return failed;
}

#endif
