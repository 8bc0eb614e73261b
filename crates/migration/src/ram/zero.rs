//! Is a page zero? Reads at the speed of memory and stops at the first byte that is not.

use std::ptr::NonNull;

use crate::memory::PAGE_SIZE;

/// The page at `page` is zero. The guest may write it meanwhile; then either answer is right, and the page
/// is dirty again.
///
/// # Safety
///
/// A whole page from `page` on is mapped; `page` is 8-byte aligned.
pub unsafe fn is_zero_page(page: NonNull<u8>) -> bool {
    fetch_ahead(page);
    // SAFETY: the caller's promise.
    if unsafe { page.cast::<u64>().read_volatile() } != 0 {
        return false;
    }
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the caller's promise; AVX2 is there.
        return unsafe { is_zero_avx2(page) };
    }
    // SAFETY: the caller's promise.
    unsafe { is_zero_words(page) }
}

/// Whoever looks at one page looks at those behind it as a rule, and waits for the first word of each longer than for
/// anything else.
fn fetch_ahead(page: NonNull<u8>) {
    const PAGES: usize = 8;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let ahead = page.as_ptr().wrapping_add(PAGES * PAGE_SIZE as usize);
        // SAFETY: a hint; of an address that is not mapped nothing comes.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (page, PAGES);
}

/// # Safety
///
/// As [`is_zero_page`].
unsafe fn is_zero_words(page: NonNull<u8>) -> bool {
    const STEP: usize = 8;
    let words = page.cast::<u64>();
    (0..PAGE_SIZE as usize / 8).step_by(STEP).all(|first| {
        // SAFETY: inside the page, aligned. Volatile, since others may write.
        let word = |i| unsafe { words.add(first + i).read_volatile() };
        (0..STEP).fold(0, |all, i| all | word(i)) == 0
    })
}

/// # Safety
///
/// As [`is_zero_page`], on a CPU with AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn is_zero_avx2(page: NonNull<u8>) -> bool {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_or_si256, _mm256_testz_si256};
    const STEP: usize = 8;
    let vectors = page.as_ptr().cast::<__m256i>();
    for first in (0..PAGE_SIZE as usize / 32).step_by(STEP) {
        // SAFETY: inside the page; the load needs no alignment.
        let vector = |i| unsafe { _mm256_loadu_si256(vectors.add(first + i)) };
        let mut all = vector(0);
        for i in 1..STEP {
            all = _mm256_or_si256(all, vector(i));
        }
        if _mm256_testz_si256(all, all) == 0 {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every way of looking sees every byte of the page, and none around it.
    #[test]
    fn one_byte_makes_a_page_not_zero() {
        let mut memory = vec![0xffu8; 3 * PAGE_SIZE as usize];
        let start = memory.as_ptr().align_offset(PAGE_SIZE as usize);
        memory[start..start + PAGE_SIZE as usize].fill(0);
        let page = NonNull::from(&mut memory[start]);
        let looks: &[unsafe fn(NonNull<u8>) -> bool] = &[
            is_zero_page,
            is_zero_words,
            #[cfg(target_arch = "x86_64")]
            |page| {
                if !std::is_x86_feature_detected!("avx2") {
                    println!("skipped: the CPU has no AVX2");
                    // SAFETY: the caller's promise.
                    return unsafe { is_zero_words(page) };
                }
                // SAFETY: the caller's promise; AVX2 is there.
                unsafe { is_zero_avx2(page) }
            },
        ];
        for look in looks {
            // SAFETY: a whole aligned page of `memory`, which nobody else uses.
            assert!(unsafe { look(page) });
            for at in 0..PAGE_SIZE as usize {
                // SAFETY: inside the page.
                let byte = unsafe { page.add(at) };
                for value in [1, 0x80] {
                    // SAFETY: as above.
                    let zero = unsafe {
                        byte.write(value);
                        let zero = look(page);
                        byte.write(0);
                        zero
                    };
                    assert!(!zero, "byte {at}");
                }
            }
        }
    }
}
