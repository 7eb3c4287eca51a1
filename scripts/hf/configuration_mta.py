"""Configuration of mta.c's models in transformers: LLaMA's, and the fields of its attention (all off by default)."""

from transformers.models.llama.configuration_llama import LlamaConfig


class MtaConfig(LlamaConfig):
    """attention_type: "mta" or "diff" (DIFF Transformer). Key-query convolutions of kq_conv_query_size x
    kq_conv_key_size (odd) stand in the layers kq_conv_layers (from 0), before or after the softmax, or both.
    head_mix_*_softmax: how many heads are mixed, 0 = none. head_norm: "none", "group" or "group_depth_scaled".
    query_chunk: queries whose attention is computed at once, 0 = all; longer sequences take several passes, whose maps
    of queries x keys are not kept for the gradients but computed again."""

    model_type = "mta"
    base_model_tp_plan = None  # heads that are mixed cannot be spread over devices

    def __init__(self, attention_type="mta", kq_conv_layers=(), kq_conv_query_size=6, kq_conv_key_size=11,
                 kq_conv_pre_softmax=False, kq_conv_post_softmax=False, head_mix_pre_softmax=0, head_mix_post_softmax=0,
                 head_norm="none", head_gate=False, query_chunk=512, bos_token_id=None, eos_token_id=None, **kwargs):
        self.attention_type = attention_type
        self.kq_conv_layers = list(kq_conv_layers)
        self.kq_conv_query_size = kq_conv_query_size
        self.kq_conv_key_size = kq_conv_key_size
        self.kq_conv_pre_softmax = kq_conv_pre_softmax
        self.kq_conv_post_softmax = kq_conv_post_softmax
        self.head_mix_pre_softmax = head_mix_pre_softmax
        self.head_mix_post_softmax = head_mix_post_softmax
        self.head_norm = head_norm
        self.head_gate = head_gate
        self.query_chunk = query_chunk
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
        self.check()

    def check(self):
        """Refuses what modeling_mta would compute otherwise than these fields say, LLaMA's among them."""
        heads, layers = self.num_attention_heads, range(self.num_hidden_layers)
        accepted = {
            "attention_type": ("mta", "diff"),
            "head_norm": ("none", "group", "group_depth_scaled"),
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "attention_dropout": (0, None),
            "head_dim": (self.hidden_size // heads, None),
        }
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted {' or '.join(map(str, values))}")
        if self.hidden_size % (2 * heads):
            raise ValueError(f"hidden_size: got {self.hidden_size} for {heads} heads, wanted heads of an even size")
        if self.kq_conv_key_size % 2 == 0:
            raise ValueError(f"kq_conv_key_size: got {self.kq_conv_key_size}, wanted an odd number")
        if not set(self.kq_conv_layers) <= set(layers):
            raise ValueError(f"kq_conv_layers: got {self.kq_conv_layers}, wanted layers from 0 to {len(layers) - 1}")
        mta = self.kq_conv_layers or self.head_mix_pre_softmax or self.head_mix_post_softmax or self.head_gate
        if self.attention_type == "diff" and mta:
            raise ValueError("attention_type diff takes head_norm only: no kq_conv, head_mix or head_gate beside it")
