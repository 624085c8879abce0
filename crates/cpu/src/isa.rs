//! Instruction sets, and which of them this machine has.

use std::{fmt, str::FromStr};

use crate::{Error, Result, kernels::Kernels};

/// An instruction set that there are kernels for. The choice changes speed, never a bit of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust for whatever the compiler was told to target: the twin that the others are tested against.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-VNNI.
    AvxVnni,
    /// x86-64 with the F, BW, DQ, VL and VNNI parts of AVX-512.
    Avx512,
    /// The same with AMX, which multiplies matrices of bytes.
    Amx,
    /// AArch64 with NEON, as all of it.
    Neon,
    /// The same with dot products of bytes.
    NeonDot,
}

impl Isa {
    const ALL: [Self; 7] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Amx,
        Self::Neon,
        Self::NeonDot,
    ];

    /// Those that this machine can run, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The fastest that this machine can run.
    pub fn best() -> Self {
        Self::available().last().unwrap_or(Self::Scalar)
    }

    /// The name on the command line and in captures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
        }
    }

    fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => crate::x86_64::avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => crate::x86_64::avx2::has_vnni(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => crate::x86_64::avx512::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => crate::x86_64::amx::is_available(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => crate::aarch64::neon::is_available(),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => crate::aarch64::neon::has_dotprod(),
            #[allow(unreachable_patterns, reason = "which sets are foreign depends on the target")]
            _ => false,
        }
    }

    /// The kernels of this set: the only way to them, so that no kernel runs on a machine that lacks it.
    pub(crate) fn kernels(self) -> Result<&'static Kernels> {
        if !self.is_available() {
            return Err(Error::IsaUnavailable { isa: self });
        }
        Ok(match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => &crate::x86_64::avx2::plain::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => &crate::x86_64::avx2::vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => &crate::x86_64::avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::Amx => &crate::x86_64::amx::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => &crate::aarch64::neon::plain::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => &crate::aarch64::neon::dotprod::KERNELS,
            _ => &crate::generic::scalar::KERNELS,
        })
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no instruction set has.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown instruction set `{name}`; there are: {}", Isa::ALL.map(Isa::name).join(", "))]
pub struct UnknownIsa {
    /// The name as given.
    pub name: String,
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| UnknownIsa { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        assert!("sse9".parse::<Isa>().unwrap_err().to_string().contains("avx512"));
    }

    /// `cargo xtask emulate` names the sets of the machine that it emulates: without them the other tests test nothing new.
    #[test]
    fn the_sets_that_are_to_be_tested_are_there() {
        let names = std::env::var("APR_TESTED_ISAS").unwrap_or_default();
        for name in names.split_terminator(',') {
            assert!(Isa::available().any(|isa| isa.name() == name), "{name}");
        }
        assert_eq!(
            cfg!(all(target_arch = "aarch64", target_endian = "little")),
            Isa::Neon.kernels().is_ok()
        );
    }

    #[test]
    fn a_set_that_the_machine_lacks_is_refused_by_name() {
        assert!(Isa::available().any(|isa| isa == Isa::Scalar));
        let foreign = if cfg!(target_arch = "aarch64") { Isa::Avx2 } else { Isa::Neon };
        let message = foreign.kernels().expect_err("foreign").to_string();
        assert!(message.contains(foreign.name()) && message.contains("scalar"), "{message}");
    }
}
