//! Token embeddings, with the dropout that follows them.

use crate::{Dropout, Result, View, ViewMut};

/// `y[n] = dropout(table[ids[n]])` for `ids[N,1]` (u32), `table[V,D]`, `y[N,D]`.
pub fn embedding_forward(ids: View, table: View, mask: Dropout, y: ViewMut) -> Result<()> {
    let _ = (ids, table, mask, y);
    todo!()
}

/// `d_table[ids[n]] += dropout(d_y[n])`, in the order of the rows whatever the number of threads; `d_table[V,D]` is f32.
pub fn embedding_backward(ids: View, d_y: View, mask: Dropout, d_table: ViewMut) -> Result<()> {
    let _ = (ids, d_y, mask, d_table);
    todo!()
}
