//! How much of a thread's stack is in memory.

use std::io;
use std::mem::MaybeUninit;

use super::page_size;

/// Where the stack of a thread lies. Outliving the thread is harmless.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stack {
    start: usize,
    len: usize,
}

impl Stack {
    /// That of the calling thread.
    pub(crate) fn of_current() -> io::Result<Self> {
        let failed = |status| if status == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(status)) };
        let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
        let (mut start, mut len) = (std::ptr::null_mut(), 0);
        // SAFETY: the first call fills in `attributes`, and only then are they read and destroyed; `start` and `len` are
        // writable.
        unsafe {
            failed(libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()))?;
            let status = libc::pthread_attr_getstack(attributes.as_ptr(), &mut start, &mut len);
            libc::pthread_attr_destroy(attributes.as_mut_ptr());
            failed(status)?;
        }
        Ok(Self { start: start.addr(), len })
    }

    /// Bytes in memory; 0 once the stack is gone.
    pub(crate) fn resident(self) -> u64 {
        let page = page_size();
        let start = self.start.next_multiple_of(page);
        let len = (self.start + self.len).saturating_sub(start) / page * page;
        let mut pages = vec![0u8; len / page];
        // SAFETY: the call only looks at whether pages are there, and fails for those that are not mapped; `pages` has a byte
        // for each.
        let status = unsafe { libc::mincore(std::ptr::without_provenance_mut(start), len, pages.as_mut_ptr()) };
        let found = if status == 0 { pages.iter().filter(|page| **page & 1 != 0).count() } else { 0 };
        (found * page) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_stack_is_measured() {
        let used = std::thread::Builder::new()
            .stack_size(super::super::STACK)
            .spawn(|| {
                let mut big = [0u8; 100_000];
                std::hint::black_box(&mut big)[50_000] = 1;
                Stack::of_current().unwrap().resident()
            })
            .unwrap();
        let used = used.join().unwrap();
        assert!((100_000..400_000).contains(&used), "{used}");
    }
}
