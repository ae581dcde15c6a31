//! Longest common subsequences, 64 columns at a time (Hyyrö, "Bit-parallel LCS-length computation revisited", 2004).
//!
//! With L(i, j) the length for the first i elements of the rows' sequence and the first j of the columns', L(i, j) − L(i, j − 1)
//! is 0 or 1. A row of the table is kept as these bits, inverted.

use std::collections::HashMap;

/// The table of two sequences, from which the length and one of the subsequences can be read.
pub(super) struct Table {
    /// For every number of row elements, the bits of its row: bit j − 1 is clear where L(i, j) > L(i, j − 1).
    rows: Vec<Vec<u64>>,
    columns: usize,
}

/// Calls `visit` with the bits of every row, from the first element's to the last's.
fn scan(rows: &[u32], columns: &[u32], mut visit: impl FnMut(&[u64])) {
    let words = columns.len().div_ceil(64);
    let mut places: HashMap<u32, Vec<usize>> = HashMap::new();
    for (place, &element) in columns.iter().enumerate() {
        places.entry(element).or_default().push(place);
    }
    let mut bits = vec![u64::MAX; words];
    let mut matches = vec![0_u64; words];
    for element in rows {
        let places = places.get(element).map_or(&[][..], Vec::as_slice);
        places.iter().for_each(|place| matches[place / 64] |= 1 << (place % 64));
        let mut carry = false;
        for (bits, matches) in bits.iter_mut().zip(&matches) {
            let (sum, first) = bits.overflowing_add(*bits & matches);
            let (sum, second) = sum.overflowing_add(u64::from(carry));
            carry = first || second;
            *bits = sum | (*bits & !matches);
        }
        places.iter().for_each(|place| matches[place / 64] = 0);
        visit(&bits);
    }
}

/// L(i, j) of a row's bits.
fn length_until(bits: &[u64], columns: usize) -> usize {
    let (words, rest) = (columns / 64, columns % 64);
    let whole: u32 = bits[..words].iter().map(|word| word.count_zeros()).sum();
    let part = if rest == 0 { 0 } else { (!bits[words] & ((1 << rest) - 1)).count_ones() };
    (whole + part) as usize
}

/// The length of the longest common subsequences.
pub(super) fn length(a: &[u32], b: &[u32]) -> usize {
    let mut length = 0;
    scan(a, b, |bits| length = length_until(bits, b.len()));
    length
}

impl Table {
    pub(super) fn new(rows: &[u32], columns: &[u32]) -> Self {
        let mut table = vec![vec![u64::MAX; columns.len().div_ceil(64)]];
        scan(rows, columns, |bits| table.push(bits.to_vec()));
        Table { rows: table, columns: columns.len() }
    }

    /// The row elements of one longest common subsequence, last to first: from the end of both, an element that is in both
    /// is taken, else the column's is left out if only that keeps the length, else the row's.
    pub(super) fn subsequence(&self, rows: &[u32], columns: &[u32]) -> Vec<usize> {
        let (mut i, mut j) = (rows.len(), self.columns);
        let mut taken = Vec::new();
        while i > 0 && j > 0 {
            if rows[i - 1] == columns[j - 1] {
                taken.push(i - 1);
                (i, j) = (i - 1, j - 1);
            } else if length_until(&self.rows[i], j - 1) > length_until(&self.rows[i - 1], j) {
                j -= 1;
            } else {
                i -= 1;
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as everybody writes it.
    fn plain_table(a: &[u32], b: &[u32]) -> Vec<Vec<usize>> {
        let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
        for (i, x) in a.iter().enumerate() {
            for (j, y) in b.iter().enumerate() {
                table[i + 1][j + 1] = if x == y { table[i][j] + 1 } else { table[i][j + 1].max(table[i + 1][j]) };
            }
        }
        table
    }

    #[test]
    fn bits_are_those_of_the_plain_table() {
        let mut random = 1_u64;
        let mut draw = |bound: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % bound
        };
        for (rows, columns, symbols) in
            [(0, 5, 2), (5, 0, 2), (1, 1, 1), (40, 64, 3), (70, 63, 9), (90, 200, 2), (33, 129, 50)]
        {
            let a: Vec<u32> = (0..rows).map(|_| draw(symbols) as u32).collect();
            let b: Vec<u32> = (0..columns).map(|_| draw(symbols) as u32).collect();
            let plain = plain_table(&a, &b);
            let table = Table::new(&a, &b);
            for (bits, row) in table.rows.iter().zip(&plain) {
                let lengths: Vec<usize> = (0..=b.len()).map(|j| length_until(bits, j)).collect();
                assert_eq!(lengths, *row);
            }
            assert_eq!(length(&a, &b), plain[a.len()][b.len()]);
            let taken = table.subsequence(&a, &b);
            assert_eq!(taken.len(), length(&a, &b));
            assert!(taken.windows(2).all(|pair| pair[0] > pair[1]));
        }
    }
}
