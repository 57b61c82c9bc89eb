/* Loaded into the lab's QEMU (LD_PRELOAD): an interrupt that VMRUN injects is delivered once.
 *
 * QEMU's VMRUN notes an injected interrupt in the processor's exception_index, delivers it by do_interrupt_x86_hardirq, and leaves
 * the note. When its loop is left for another reason soon after, the interrupt is delivered again, even with interrupts off.
 * Here that function takes the note away first, which its other caller does by itself. Where the code is not what is expected,
 * nothing is changed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

static void (*deliver)(void *cpu, int number, int is_int, int error_code, uintptr_t next_eip, int is_hardware);
static uint32_t state_offset, index_offset;

static void once(char *state, int number, int is_hardware)
{
	char *cpu = state - state_offset;

	*(int32_t *)(cpu + index_offset) = -1;
	deliver(cpu, number, 0, 0, 0, is_hardware);
}

/* endbr64, which QEMU 7.2 is built without; mov %edx,%r9d; sub $state_offset,%rdi; xor %r8d,%r8d; xor %ecx,%ecx; xor %edx,%edx;
 * jmp do_interrupt_all */
static int is_expected(const unsigned char *code)
{
	int32_t distance;

	if (!memcmp(code, "\xf3\x0f\x1e\xfa", 4))
		code += 4;
	memcpy(&state_offset, code + 6, 4);
	memcpy(&distance, code + 18, 4);
	return !memcmp(code, "\x41\x89\xd1\x48\x81\xef", 6) && !memcmp(code + 10, "\x45\x31\xc0\x31\xc9\x31\xd2\xe9", 8) &&
	       code + 22 + distance == (const unsigned char *)deliver;
}

/* movl $-1,index_offset(%rdi), near the start of cpu_loop_exit_noexc */
static int find_index(const unsigned char *code)
{
	for (int at = 0; at < 16; at++) {
		memcpy(&index_offset, code + at + 2, 4);
		if (!memcmp(code + at, "\xc7\x87", 2) && !memcmp(code + at + 6, "\xff\xff\xff\xff", 4))
			return 1;
	}
	return 0;
}

__attribute__((constructor)) static void mend(void)
{
	/* mov $once,%rax; jmp *%rax */
	unsigned char jump[12] = {0x48, 0xb8, [10] = 0xff, [11] = 0xe0};
	unsigned char *function = dlsym(RTLD_DEFAULT, "do_interrupt_x86_hardirq");
	unsigned char *no_exception = dlsym(RTLD_DEFAULT, "cpu_loop_exit_noexc");
	uintptr_t target = (uintptr_t)once, page = (uintptr_t)function & -4096;

	*(void **)&deliver = dlsym(RTLD_DEFAULT, "do_interrupt_all");
	if (!function || !no_exception || !deliver || !is_expected(function) || !find_index(no_exception))
		return;
	memcpy(jump + 2, &target, sizeof target);
	if (mprotect((void *)page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC))
		return;
	memcpy(function, jump, sizeof jump);
	mprotect((void *)page, 8192, PROT_READ | PROT_EXEC);
}
