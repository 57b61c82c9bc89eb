//! The part of libc that the shim needs. It has the allocator, and the end in a panic. Only in the shim, on its one thread.
//!
//! The first instructions and memory functions are the processor's, in `sys/arch`.
#![allow(unsafe_code, reason = "the runtime itself")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::panic::PanicInfo;
use core::ptr;

use super::sys;

/// What the first instructions call.
pub(super) extern "C" fn start() -> ! {
    super::run()
}

/// The smallest block: two words, so that a free one can hold a link and all are aligned for anything.
const SMALLEST: usize = 16;
/// Blocks up to `SMALLEST << (CLASSES - 1)`, 32 KiB, come from chunks; larger ones straight from the kernel.
const CLASSES: usize = 12;
/// What is taken from the kernel at a time for small blocks.
const CHUNK: usize = 64 * 1024;
/// How the kernel aligns what it gives.
const PAGE: usize = 4096;

/// Powers of two with a list of free blocks each: nothing leaks, nothing moves, and a few hundred bytes of code suffice.
struct Allocator(UnsafeCell<Lists>);

struct Lists {
    free: [*mut u8; CLASSES],
    chunk: *mut u8,
    left: usize,
}

// SAFETY: the shim has one thread.
unsafe impl Sync for Allocator {}

#[global_allocator]
static ALLOCATOR: Allocator =
    Allocator(UnsafeCell::new(Lists { free: [ptr::null_mut(); CLASSES], chunk: ptr::null_mut(), left: 0 }));

/// The class that serves a layout, if a chunk does.
fn class(layout: Layout) -> Option<usize> {
    let size = layout.size().max(layout.align()).max(SMALLEST).next_power_of_two();
    let class = (size / SMALLEST).trailing_zeros() as usize;
    // Blocks are aligned to their size, but at most to a page.
    (class < CLASSES && layout.align() <= PAGE).then_some(class)
}

// SAFETY: blocks are disjoint: each is cut once from a chunk or mapping, and is either in one free list or with one owner. A block of a
// class is aligned to its size, as chunks are page-aligned and handed out from classes rounded up (see `alloc`).
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: one thread, and nothing here calls back into the allocator.
        let lists = unsafe { &mut *self.0.get() };
        let Some(class) = class(layout) else {
            // The kernel aligns to a page, which is more than anything here asks for.
            return if layout.align() > PAGE { ptr::null_mut() } else { sys::map(layout.size()) };
        };
        let block = lists.free[class];
        if !block.is_null() {
            // SAFETY: a free block holds the link to the next one in its first word.
            lists.free[class] = unsafe { block.cast::<*mut u8>().read() };
            return block;
        }
        let size = SMALLEST << class;
        // Aligned to its size, at most to a page; what is skipped is lost once a chunk at most, and chunks are never given back.
        let mut skip = lists.chunk.align_offset(size.min(PAGE));
        if skip.saturating_add(size) > lists.left {
            let chunk = sys::map(CHUNK);
            if chunk.is_null() {
                return chunk;
            }
            (lists.chunk, lists.left, skip) = (chunk, CHUNK, 0);
        }
        // SAFETY: `skip + size` bytes are left in the chunk.
        unsafe {
            let block = lists.chunk.add(skip);
            lists.chunk = block.add(size);
            lists.left -= skip + size;
            block
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        let lists = unsafe { &mut *self.0.get() };
        match class(layout) {
            Some(class) => {
                // SAFETY: the block is ours again, aligned for a pointer and long enough for one.
                unsafe { block.cast::<*mut u8>().write(lists.free[class]) };
                lists.free[class] = block;
            }
            // SAFETY: the block was mapped with this size and is used no more.
            None => unsafe { sys::unmap(block, layout.size()) },
        }
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // Where is enough to find out what, and formatting the message would be a third of the program.
    let (file, line) = info.location().map_or(("?", 0), |at| (at.file(), at.line()));
    super::poweroff::say(&[
        b"panic at ",
        file.as_bytes(),
        b" line ",
        super::poweroff::Decimal::new(line.into()).as_bytes(),
    ]);
    super::poweroff::fault()
}

// The prebuilt `alloc` refers to both, though with `panic=abort` nothing ever calls them.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() {}
