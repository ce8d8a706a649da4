"""Everything that this project claims about GPUs, and what would show it: tests, a sanitizer, targets, the command.

A claim without a measurement is on docs/gpu-status.md too: that is what the page is for.
"""

from __future__ import annotations

from typing import NamedTuple

NATIVE = ("cuda", "triton")
ALL = (*NATIVE, "reference")
REFERENCE = ("reference",)
WHICHEVER = ()  # what "auto" chooses


class Claim(NamedTuple):
    text: str
    tests: tuple[str, ...]  # of tests/gpu: file::function, without the folder and the ending
    backends: tuple[str, ...] = NATIVE


# Of a file of results, what a reader has to know and no rule can.
REMARKS = {
    "gpu-nvidia-h200-2026-11-26-3.json": "; the case of the reference under `torch.compile` was ended by the time "
    "limit while it compiled",
    "gpu-nvidia-h200-2026-11-26-4.json": "; `test_row_statistics` fails there by its own fault: it stacked fields that "
    "are None without a reference",
    "gpu-nvidia-h200-2026-11-26-8.json": "; three classes of float32 miss their bound there by 0.2 %, and a CUDA graph "
    "cannot capture numbers of the host: since repaired; the memory test took the GEMMs' workspace for the loss's",
}

# By topic. The numbers in parentheses are those that the tests' docstrings give to failures of other fused losses.
CLAIMS: dict[str, list[Claim]] = {
    "The reference backend": [
        Claim(
            "`make demo` on a CUDA device (fine-tuning, through the kernels)",
            ("demo::the_demo_runs",), WHICHEVER,
        ),
        Claim(
            "bad labels on a CUDA device: the row's loss is NaN, `validate=True` raises IndexError (reference backend)",
            ("labels::a_bad_label_is_nan_in_its_row_alone", "labels::validation_names_row_and_label"), REFERENCE,
        ),
        Claim(
            '`torch.compile` (inductor) of `backend="reference"` on a CUDA device gives eager\'s loss and gradient',
            ("compile::compiled_once_for_all_shapes",), REFERENCE,
        ),
        Claim(
            "second derivatives, `torch.func` and `vmap` through the reference backend on a CUDA device",
            ("autograd::second_derivatives", "autograd::func_grad_and_vmap", "autograd::func_jacrev_twice"), REFERENCE,
        ),
    ],
    "Backends": [
        Claim("the backend runs where it is built", ("backends::the_backend_runs",)),
        Claim('`backend="auto"` is one of the kernels', ("backends::auto_is_a_native_backend",), WHICHEVER),
        Claim(
            "every option of a call gives what the reference gives: reductions, normalizer, scale, softcap, shift, "
            "class dimension, class weights, probabilities",
            ("backends::every_option", "backends::class_weights_and_probability_targets",
             "backends::shapes_of_language_models_and_images"),
        ),
        Claim("`row_statistics`, custom terms, learned coefficients and scales",
              ("backends::row_statistics", "backends::custom_terms_and_learned_numbers")),
        Claim("`objkern.cross_entropy` follows torch's, and does not wait for the device",
              ("backends::the_drop_in_follows_torch", "streams::the_drop_in_does_not_wait"), WHICHEVER),
        Claim("parts are detached and true (27)", ("backends::parts",)),
    ],
    "Digits": [
        Claim(
            "loss and gradient at most twice as far from float64 as torch's own, every term, dtype and vocabulary (29)",
            ("precision::every_term_at_once", "precision::plain_cross_entropy", "precision::each_term"),
        ),
        Claim("many short rows", ("precision::many_short_rows",)),
        Claim("sure rows keep their digits (5, 6)",
              ("precision::sure_rows_keep_their_digits", "precision::half_precision_gradient_of_a_sure_row"), ALL),
        Claim("a common offset changes nothing (7)", ("precision::a_common_offset_changes_nothing",)),
        Claim("two logits at 2^24 (7); half-precision logits have a float32 loss (9)",
              ("precision::two_logits_at_two_to_the_24", "precision::half_logits_have_a_float32_loss"), ALL),
        Claim("long rows: no drift, the maximum may rise in every tile",
              ("precision::long_rows_accumulate_without_drift", "precision::the_maximum_may_rise_in_every_tile")),
        Claim("float16 under loss scaling", ("autograd::loss_scaling",)),
        Claim("bitwise the same in every run and every process (30)",
              ("autograd::bitwise_the_same_in_every_run", "autograd::bitwise_the_same_in_every_process")),
    ],
    "The fused linear path": [
        Claim("values and gradients of both modes, every dtype, at most twice as far from float64 as torch's own",
              ("linear::as_the_logits_path", "linear::row_statistics_and_custom_terms",
               "linear::half_precision_gradients_of_float32_logits")),
        Claim("coefficients that lie on the host, each that of its own term; their gradients lie there, too",
              ("linear::coefficients_on_the_host",)),
        Claim("nothing waits for the device; a CUDA graph captures forward and backward (20)",
              ("linear::nothing_waits_for_the_device", "linear::a_graph_captures_and_replays")),
        Claim("memory is a chunk and the gradients, flat in the rows; none for a frozen weight (23)",
              ("linear::memory_is_a_chunk_and_the_gradients",)),
    ],
    "Elementwise objectives": [
        Claim("values, gradients and parts of every term, dtype and reduction, at most twice as far from float64 as "
              "torch's own; weights that broadcast",
              ("elementwise::every_term", "elementwise::weights_options_and_parts")),
        Claim("the drop-ins follow torch's", ("elementwise::the_drop_ins_follow_torch",), WHICHEVER),
        Claim("nothing waits for the device; a CUDA graph captures forward and backward (20)",
              ("elementwise::nothing_waits_and_a_graph_captures",)),
        Claim("bitwise the same in every run (30); elements that begin anywhere",
              ("elementwise::bitwise_the_same_and_more_than_one_block",)),
    ],
    "Divergence from a reference": [
        Claim("values and gradients in both directions, every dtype and vocabulary, at most twice as far from float64 "
              "as torch's own; beside other terms",
              ("divergence::values_and_gradients", "divergence::beside_other_terms")),
        Claim("a divergence alone; a reference that excludes thousands of classes in a row",
              ("divergence::alone", "divergence::a_reference_that_excludes_thousands_of_classes")),
        Claim("masks of the least number of a dtype are as good as −inf, over T < 1 and in derivatives of statistics",
              ("divergence::masks_of_the_least_number", "divergence::statistics_beside_masks_of_the_least_number")),
        Claim("a divergence of 1e-6 keeps three digits", ("divergence::a_small_divergence_keeps_its_digits",)),
        Claim("the linear path, `row_statistics`, custom terms",
              ("divergence::the_linear_path", "divergence::statistics")),
        Claim("nothing waits for the device; a CUDA graph captures forward and backward (20)",
              ("divergence::graphs_and_waiting",)),
    ],
    "Terms on parameters": [
        Claim("values, gradients and `accumulate_` of every term and dtype, through the kernels of the device",
              ("penalties::values_and_gradients",), WHICHEVER),
    ],
    "Memory and layout": [
        Claim("more than 2^31 and 2^32 logits: the last rows are right (10)",
              ("large::more_logits_than_32_bits_count",)),
        Claim("the caller's logits are never written (1)", ("layouts::the_callers_logits_are_never_written",)),
        Claim("tensors whose memory has been freed are an error", ("layouts::memory_that_is_gone_is_an_error",)),
        Claim("any strides of logits and of upstream gradients (11); rows that begin anywhere",
              ("layouts::any_strides", "layouts::rows_that_begin_anywhere",
               "layouts::expanded_logits_and_upstream_gradients")),
        Claim("the forward pass allocates no (N, V) tensor, the backward pass exactly one; strided logits, no copy",
              ("autograd::memory_of_a_pass", "autograd::memory_of_strided_logits")),
    ],
    "Labels and masks": [
        Claim("all rows ignored, no rows, one class (12)",
              ("labels::all_rows_ignored", "precision::no_rows_and_no_other_class"), ALL),
        Claim("bad labels: the row is NaN, no other is touched; `validate=True` names row and label (13)",
              ("labels::a_bad_label_is_nan_in_its_row_alone", "labels::validation_names_row_and_label")),
        Claim("`ignore_index` inside the vocabulary (14)", ("labels::ignore_index_inside_the_vocabulary",), ALL),
        Claim("strongly negative rows with odd V (15)", ("precision::strongly_negative_rows",), ALL),
        Claim("masked vocabularies, one finite logit anywhere (16); NaN and infinity stay in their row",
              ("precision::masked_vocabularies", "precision::one_finite_logit_at_every_place",
               "precision::nan_infinity_and_rows_without_classes"), ALL),
        Claim("means divide by the rows that count (17)", ("labels::means_divide_by_the_rows_that_count",), ALL),
    ],
    "Backward passes and torch": [
        Claim("several backward passes of one graph (2)", ("autograd::several_backward_passes",)),
        Claim("every row has its own upstream gradient (3, 4)", ("layouts::every_row_has_its_own_upstream_gradient",)),
        Claim('`gradient="forward"`: an upstream gradient of 1 leaves it bit for bit, any other gives that of the '
              "backward pass", ("autograd::an_upstream_gradient_of_one_leaves_the_gradient_of_the_forward_pass",)),
        Claim("second derivatives, `torch.func`, `vmap`, checkpointing",
              ("autograd::second_derivatives", "autograd::func_grad_and_vmap", "autograd::func_jacrev_twice",
               "autograd::saved_tensor_hooks_and_checkpointing")),
        Claim("`torch.compile`: one graph, eager's numbers, ignored labels, no recompiling (18)",
              ("compile::compiled_once_for_all_shapes", "compile::compiled_with_a_head",
               "compile::a_schedule_does_not_recompile", "compile::compiled_with_cuda_graphs")),
        Claim("autocast (19)", ("compile::autocast",), ALL),
    ],
    "A split vocabulary": [
        Claim("the parts of a row, collected one after the other on one device, make the whole: values and gradients, "
              "on logits and linear; nothing waits for the device",
              ("distributed::parts_make_the_whole",)),
        Claim("ranks on devices of their own, by NCCL (needs two or more devices)",
              ("distributed::ranks_on_devices_of_their_own",), WHICHEVER),
        Claim("fine-tuning on several devices: data, fsdp and tensor give one device's steps (needs two or more)",
              ("distributed::the_loop_on_devices_of_their_own",), WHICHEVER),
    ],
    "Streams, devices, graphs": [
        Claim("nothing waits for the device (20)",
              ("streams::nothing_waits_for_the_device",)),
        Claim("CUDA graphs capture and replay every option, with new logits, labels and coefficients (20)",
              ("streams::a_graph_captures_and_replays",)),
        Claim("a side stream behind a long kernel (21); threads with streams of their own",
              ("streams::a_side_stream_behind_a_long_kernel", "streams::threads_with_streams_of_their_own")),
        Claim("tensors on another device than the current one (21)",
              ("streams::another_device_than_the_current_one",)),
    ],
}  # fmt: skip

SANITIZER = {
    "memcheck": "no access out of bounds or misaligned",
    "racecheck": "no hazard in shared memory",
    "initcheck": "no read of memory that nobody wrote",
    "synccheck": "no barrier that some threads miss",
}
