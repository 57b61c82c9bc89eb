/* What most of Linux's files begin with. guest/kernel/compiler has it parsed once. */
#include <linux/module.h>
#include <linux/kernel.h>
#include <linux/slab.h>
#include <linux/sched.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/skbuff.h>
#include <linux/netdevice.h>
#include <linux/interrupt.h>
#include <linux/seq_file.h>
#include <linux/uaccess.h>
#include <linux/blkdev.h>
#include <linux/bpf.h>
#include <linux/cgroup.h>
#include <linux/syscalls.h>
#include <net/sock.h>
/* Every file has its own. */
#undef pr_fmt
