//! A placeholder of the CUDA driver.

use super::{Launch, Product};
use crate::{Error, Result};

pub(crate) struct Cuda(std::convert::Infallible);

impl Cuda {
    pub(crate) fn new(_ordinal: usize) -> Result<Self> {
        Err(Error::NoCuda)
    }

    pub(crate) fn allocate(&self, _bytes: usize) -> Result<usize> {
        match self.0 {}
    }

    pub(crate) fn free(&self, _address: usize) {
        match self.0 {}
    }

    pub(crate) fn upload(&self, _address: usize, _bytes: &[u8]) -> Result<()> {
        match self.0 {}
    }

    pub(crate) fn download(&self, _address: usize, _bytes: &mut [u8]) -> Result<()> {
        match self.0 {}
    }

    pub(crate) fn copy(&self, _to: usize, _from: usize, _bytes: usize) -> Result<()> {
        match self.0 {}
    }

    pub(crate) fn fill_zero(&self, _address: usize, _bytes: usize) -> Result<()> {
        match self.0 {}
    }

    pub(crate) fn launch(&self, _launch: &Launch) -> Result<()> {
        match self.0 {}
    }

    pub(crate) fn gemm(&self, _product: Product) -> Result<()> {
        match self.0 {}
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        match self.0 {}
    }
}
