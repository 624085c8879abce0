//! Which type each tensor is stored in: llama.cpp's published mixes.

use std::{fmt, str::FromStr};

use apr_tensor::DType;

/// A named choice of types, as `llama-quantize` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, non_camel_case_types, reason = "the field's own names")]
pub enum Recipe {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K_S,
    Q3_K_M,
    Q3_K_L,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
    Q6_K,
}

/// Recipe, name, llama.cpp's `general.file_type`, the type of most tensors.
const TABLE: [(Recipe, &str, u32, DType); 17] = [
    (Recipe::F32, "f32", 0, DType::F32),
    (Recipe::F16, "f16", 1, DType::F16),
    (Recipe::BF16, "bf16", 32, DType::BF16),
    (Recipe::Q4_0, "q4_0", 2, DType::Q4_0),
    (Recipe::Q4_1, "q4_1", 3, DType::Q4_1),
    (Recipe::Q5_0, "q5_0", 8, DType::Q5_0),
    (Recipe::Q5_1, "q5_1", 9, DType::Q5_1),
    (Recipe::Q8_0, "q8_0", 7, DType::Q8_0),
    (Recipe::Q2_K, "q2_k", 10, DType::Q2_K),
    (Recipe::Q3_K_S, "q3_k_s", 11, DType::Q3_K),
    (Recipe::Q3_K_M, "q3_k_m", 12, DType::Q3_K),
    (Recipe::Q3_K_L, "q3_k_l", 13, DType::Q3_K),
    (Recipe::Q4_K_S, "q4_k_s", 14, DType::Q4_K),
    (Recipe::Q4_K_M, "q4_k_m", 15, DType::Q4_K),
    (Recipe::Q5_K_S, "q5_k_s", 16, DType::Q5_K),
    (Recipe::Q5_K_M, "q5_k_m", 17, DType::Q5_K),
    (Recipe::Q6_K, "q6_k", 18, DType::Q6_K),
];

impl Recipe {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    fn row(self) -> &'static (Self, &'static str, u32, DType) {
        &TABLE[self as usize]
    }

    /// The name, in lower case.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// llama.cpp's number of it, for `general.file_type`.
    pub fn file_type(self) -> u32 {
        self.row().2
    }

    /// The type of most tensors.
    pub fn dtype(self) -> DType {
        self.row().3
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Recipe {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::all().find(|recipe| recipe.name().eq_ignore_ascii_case(name)).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum_and_names_are_read_back() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i, "{}", row.1);
            assert_eq!(row.1.to_uppercase().parse(), Ok(row.0));
        }
    }
}
