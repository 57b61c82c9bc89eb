//! What a container says that never comes to life.

use std::time::Duration;

use cofferdam::{Container, ErrorKind};

use crate::fixture::{Outcome, Temp, debian, debian_container, kernel, tiny_kernel};
use crate::{check, check_eq};

pub fn a_guest_that_is_never_ready_names_its_stage() -> Outcome {
    let temp = Temp::new()?;
    // jmp .
    let spinning = tiny_kernel(&temp, &[0xeb, 0xfe])?;
    let error = Container::builder(debian()).kernel(spinning).start_timeout(Duration::from_millis(500)).start();
    let error = error.map(drop).expect_err("it spins");
    check_eq!(error.kind(), ErrorKind::TimedOut);
    check!(error.to_string().contains("last stage: first vCPU running"), "{error}");
    Ok(())
}

pub fn a_guest_that_ends_first_says_how() -> Outcome {
    let temp = Temp::new()?;
    let dying = tiny_kernel(&temp, &[0x0f, 0x0b])?;
    let error = debian_container().kernel(dying).start().map(drop).expect_err("a triple fault");
    check_eq!(error.kind(), ErrorKind::GuestFailed);
    check!(error.to_string().contains("triple fault"), "{error}");
    Ok(())
}

pub fn a_broken_shim_is_told() -> Outcome {
    // A root device that is not there, as the kernel has no driver called up for it.
    let kernel = kernel().cmdline("virtio_blk.dummy=1 initcall_blacklist=virtio_blk_init,init");
    let error = debian_container().kernel(kernel).start_timeout(Duration::from_secs(60)).start();
    let error = error.map(drop).expect_err("no disk");
    check!(error.to_string().contains("/dev/vda"), "{error}");
    check_eq!(error.kind(), ErrorKind::GuestFailed);
    Ok(())
}
