/* Process attributes that Python's standard library does not reach. */
#ifndef MIC_PROC_H
#define MIC_PROC_H

/* cffi-begin */
/* All return 0 or -errno. */
int mic_proc_die_with_parent(
	int expected_parent);            /* SIGKILL when the parent dies; ESRCH if it is gone already */
int mic_proc_adopt_orphans(void);        /* become the reaper of orphaned descendants */
int mic_proc_set_name(const char *name); /* 15 characters, what ps -o comm shows */
int mic_proc_no_core(void);
int mic_proc_userfaultfd(void); /* may we have one, as libscif needs it? */
/* cffi-end */

#endif
