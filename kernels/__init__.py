"""The Triton kernels, imported as fastlora.kernels: tensors in, tensors out; no autograd, no Module."""
