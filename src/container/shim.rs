//! The guest's PID 1.
//!
//! It is the program that `build.rs` made, put into an initramfs with its configuration.

use std::borrow::Cow;

use crate::boot::Initramfs;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{BOOT_CONFIG_PATH, BootConfig};

/// Empty where documentation is built, and where `build.rs` may do without a linker.
static BUILT_IN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim"));

/// Names another shim at run time, for work on the shim itself.
const OVERRIDE: &str = "COFFERDAM_SHIM";

fn program() -> Result<Cow<'static, [u8]>> {
    if let Some(path) = std::env::var_os(OVERRIDE).filter(|path| !path.is_empty()) {
        let read = std::fs::read(&path);
        return read
            .map(Cow::Owned)
            .doing(|| format!("reading the shim that {OVERRIDE} names, {}", path.to_string_lossy()));
    }
    if BUILT_IN.is_empty() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "this build has no guest shim, as it was made for documentation or without a linker; build again without DOCS_RS, where a linker for the host is",
        ));
    }
    Ok(Cow::Borrowed(BUILT_IN))
}

/// Adds the shim and what it must know to `base`, as `/init`.
pub(super) fn initramfs(base: Initramfs, config: &BootConfig<'_>) -> Result<Initramfs> {
    let config = config
        .encode()
        .map_err(|e| Error::new(ErrorKind::InvalidConfig, format!("the guest's boot configuration: {}", e.0)))?;
    Ok(base
        .directory("/dev", 0o755)
        .character_device("/dev/console", 0o600, (5, 1))
        .file(BOOT_CONFIG_PATH, 0o600, config)
        .file("/init", 0o755, program()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shim_is_built_in_and_small() {
        assert!(!BUILT_IN.is_empty() && BUILT_IN.len() < 128 * 1024, "{} bytes", BUILT_IN.len());
    }
}
