/* What most of its network files begin with besides. */
#include "headers.h"
/* As Linux itself has it where a file has none. */
#define pr_fmt(fmt) fmt
#include <linux/etherdevice.h>
#include <linux/icmpv6.h>
#include <linux/if_vlan.h>
#include <linux/inetdevice.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/x_tables.h>
#include <linux/netfilter_ipv4.h>
#include <linux/proc_fs.h>
#include <linux/rtnetlink.h>
#include <net/addrconf.h>
#include <net/genetlink.h>
#include <net/icmp.h>
#include <net/ip.h>
#include <net/ip6_route.h>
#include <net/ipv6.h>
#include <net/netfilter/nf_conntrack.h>
#include <net/netlink.h>
#include <net/protocol.h>
#include <net/route.h>
#include <net/udp.h>
#include <net/xfrm.h>
/* Every file has its own. */
#undef pr_fmt
