//! A micro-batch on a device: examples one after the other, without padding.

use quintet_kernels::{Device, Segments, Tensor};

use crate::Result;

/// Token ids of sources and targets, and where each example begins.
pub struct Batch {
    pub(crate) source_ids: Tensor,
    pub(crate) source: Segments,
    /// The decoder's input: the labels shifted right by one, beginning with the start token.
    pub(crate) decoder_ids: Tensor,
    pub(crate) labels: Tensor,
    pub(crate) target: Segments,
    /// Of a classifier's: the decoder's row that stands for each example.
    pub(crate) pooled_rows: Option<Tensor>,
}

impl Batch {
    /// From concatenated ids and their offsets (`cu_seqlens`, one more than there are examples). Targets are the labels,
    /// eos included; `decoder_start` is the token before the first.
    pub fn new(
        device: &Device,
        source_ids: &[u32],
        source_offsets: &[u32],
        target_ids: &[u32],
        target_offsets: &[u32],
        decoder_start: u32,
    ) -> Result<Self> {
        assert_eq!(source_offsets.len(), target_offsets.len(), "as many targets as sources");
        let source = Segments::from_offsets(source_offsets);
        let target = Segments::from_offsets(target_offsets);
        assert_eq!((source.end(), target.end()), (source_ids.len(), target_ids.len()), "offsets end with the ids");
        let mut decoder_ids = Vec::with_capacity(target_ids.len());
        for index in 0..target.len() {
            let labels = &target_ids[target.rows(index)];
            assert!(!labels.is_empty(), "a target has at least its eos");
            decoder_ids.push(decoder_start);
            decoder_ids.extend_from_slice(&labels[..labels.len() - 1]);
        }
        Ok(Batch {
            source_ids: device.upload(source_ids, source_ids.len(), 1)?,
            source,
            decoder_ids: device.upload(&decoder_ids, decoder_ids.len(), 1)?,
            labels: device.upload(target_ids, target_ids.len(), 1)?,
            target,
            pooled_rows: None,
        })
    }

    /// For a classifier: each source ends with `eos` (or has it somewhere), and `labels` are the classes' numbers. The
    /// decoder reads the source too, shifted right.
    pub fn classification(
        device: &Device,
        source_ids: &[u32],
        source_offsets: &[u32],
        labels: &[u32],
        decoder_start: u32,
        eos: u32,
    ) -> Result<Self> {
        let mut batch = Self::new(device, source_ids, source_offsets, source_ids, source_offsets, decoder_start)?;
        assert_eq!(labels.len(), batch.examples(), "as many labels as examples");
        let last_eos = |index: usize| {
            let rows = batch.source.rows(index);
            rows.clone().rev().find(|&row| source_ids[row] == eos).unwrap_or(rows.end - 1) as u32
        };
        let rows: Vec<u32> = (0..batch.examples()).map(last_eos).collect();
        batch.pooled_rows = Some(device.upload(&rows, rows.len(), 1)?);
        batch.labels = device.upload(labels, labels.len(), 1)?;
        Ok(batch)
    }

    pub fn examples(&self) -> usize {
        self.source.len()
    }

    pub fn source_tokens(&self) -> usize {
        self.source_ids.rows()
    }

    /// What losses are counted over: tokens of targets, or a classifier's examples.
    pub fn target_tokens(&self) -> usize {
        self.labels.rows()
    }
}
