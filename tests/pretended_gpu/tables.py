"""Properties of torch's operations on CUDA that a simulated GPU needs, by the name of the operation in aten or torchvision."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that only describe existing memory, or reserve some: they launch nothing.
NO_LAUNCH = _names(
    "alias as_strided as_strided_ detach detach_ empty empty_like empty_strided new_empty new_empty_strided expand lift lift_fresh "
    "permute select slice split split_with_sizes squeeze t transpose unbind unsqueeze view view_as_real _unsafe_view _reshape_alias unfold "
    "diagonal is_same_size _local_scalar_dense record_stream _has_compatible_shallow_copy_type is_pinned resolve_conj resolve_neg"
)

# The size or value of the result depends on numbers, so that the host waits. So it does for `index` and `index_put` with a mask.
WAITING = _names(
    "_local_scalar_dense nonzero masked_select unique_dim _unique2 unique_consecutive nms equal is_nonzero _linalg_svd _linalg_eigh"
)

# Operations that sort the indices with torch.use_deterministic_algorithms, according to the first half of its documentation.
SORTED = _names(
    "index_put index_put_ _index_put_impl_ index_copy index_copy_ index_add index_add_ scatter_add scatter_add_ embedding_dense_backward "
    "_unsafe_index_put"
)

# Operations without a deterministic CUDA kernel, with their names in the documentation of torch.use_deterministic_algorithms. Those not
# named there call alertNotDeterministic in CUDA sources of torchvision, or did so in older versions of torch.
NONDETERMINISTIC_BY_NAME = {
    "torch.nn.AvgPool3d": "avg_pool3d_backward",
    "torch.nn.AdaptiveAvgPool2d": "_adaptive_avg_pool2d_backward",
    "torch.nn.AdaptiveAvgPool3d": "_adaptive_avg_pool3d_backward",
    "torch.nn.AdaptiveMaxPool2d": "adaptive_max_pool2d_backward",
    "torch.nn.FractionalMaxPool2d": "fractional_max_pool2d_backward",
    "torch.nn.FractionalMaxPool3d": "fractional_max_pool3d_backward",
    "torch.nn.MaxPool3d": "max_pool3d_with_indices_backward",
    "torch.nn.MaxUnpool1d": "max_unpool2d",
    "torch.nn.MaxUnpool2d": "max_unpool2d",
    "torch.nn.MaxUnpool3d": "max_unpool3d",
    "torch.nn.functional.interpolate": (
        "upsample_linear1d_backward upsample_bilinear2d_backward _upsample_bilinear2d_aa_backward upsample_bicubic2d_backward "
        "_upsample_bicubic2d_aa_backward upsample_trilinear3d_backward"
    ),
    "torch.nn.ReflectionPad1d": "reflection_pad1d_backward",
    "torch.nn.ReflectionPad2d": "reflection_pad2d_backward",
    "torch.nn.ReflectionPad3d": "reflection_pad3d_backward",
    "torch.nn.NLLLoss": "nll_loss2d_forward",
    "torch.nn.CTCLoss": "_ctc_loss_backward",
    "torch.nn.EmbeddingBag": "_embedding_bag_dense_backward",
    "torch.Tensor.put_": "put put_",
    "torch.histc": "histc",
    "torch.bincount": "bincount",
    "torch.kthvalue": "kthvalue",
    "torch.median": "median",
    "torch.nn.functional.grid_sample": "grid_sampler_2d_backward grid_sampler_3d_backward",
    "torch.cumsum": "",
    "torch.Tensor.scatter_reduce": "scatter_reduce scatter_reduce_",
    "torch.Tensor.resize_": "",  # only for a quantized tensor
    "torchvision.ops.roi_align": "_roi_align_backward",
    "torchvision.ops.ps_roi_align": "_ps_roi_align_backward",
    "torchvision.ops.roi_pool": "_roi_pool_backward",
}
NONDETERMINISTIC = _names(" ".join(NONDETERMINISTIC_BY_NAME.values()))
