"""mta.c's models in PyTorch, for transformers: LLaMA with Multi-Token Attention (arXiv 2504.00927), or with DIFF
Transformer's.

Shapes: B sequences, T new tokens, L tokens with those of the cache, C width, NH heads, NKV key/value heads, HS head
size, cq x ck queries x keys of a convolution. A map is (B, NH, queries, keys): scores, after the softmax weights.

Attention computes maps for `query_chunk` queries at a time. A convolution reads the maps of earlier queries, so a chunk
starts `halo` queries earlier, and the cache of such a layer holds queries beside the keys. Maps are kept in fp32.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_mta import MtaConfig

# The models whose labels transformers' Trainer shifts under label_smoothing_factor.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mta"] = "MtaForCausalLM"

# Before torch 2.4 it cannot be asked.
has_autocast = getattr(torch.amp, "is_autocast_available", ("cpu", "cuda").__contains__)

# What transformers calls the cache in a model's output: past_key_values, since 5.2x cache.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def wide(x):
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_fp32(x):
    """Without autocast, as the Trainer has it for bf16=True: convolutions and mixings would compute in bf16."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if has_autocast(kind) else nullcontext()


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def start(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        y = wide(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class KeyQueryConv(nn.Module):
    """Of each head: out[i, j] = sum over a < cq, b < ck of weight[a, b] inp[i - (cq - 1) + a, j - (ck - 1) / 2 + b].
    The caller sees to it that inp is zero where a query does not see a key."""

    def __init__(self, heads, cq, ck):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, cq, ck))

    def start(self):
        """As the identity."""
        nn.init.zeros_(self.weight)
        self.weight[:, -1, self.weight.shape[2] // 2] = 1

    def forward(self, maps):
        heads, cq, ck = self.weight.shape
        maps = F.pad(maps, (ck // 2, ck // 2, cq - 1, 0))
        return F.conv2d(maps, self.weight[:, None].to(maps.dtype), groups=heads)


class HeadMix(nn.Module):
    """Of each group of ch heads: out[o] = sum over n of weight[o, n] inp[n]."""

    def __init__(self, heads, ch):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads // ch, ch, ch))

    def start(self):
        """As the identity."""
        self.weight.copy_(torch.eye(self.weight.shape[1], device=self.weight.device))

    def forward(self, maps):
        groups, ch, _ = self.weight.shape
        mixed = torch.einsum("gon,bgnij->bgoij", self.weight.to(maps.dtype), maps.unflatten(1, (groups, ch)))
        return mixed.flatten(1, 2)


class HeadGate(nn.Module):
    """One gate a token and head: inp * sigmoid(inp . weight + bias)."""

    def __init__(self, size, std):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(1))
        self.std = std

    def start(self):
        nn.init.trunc_normal_(self.weight, std=self.std, a=-3 * self.std, b=3 * self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return x * torch.sigmoid((x * self.weight).sum(-1, keepdim=True) + self.bias)


def rope_frequencies(config):
    """Radians per position of the HS / 2 pairs of a head, with Llama 3's scaling where configured; on the CPU."""
    rope = getattr(config, "rope_parameters", None) or dict(config.rope_scaling or {}, rope_theta=config.rope_theta)
    kind, size = rope.get("rope_type", rope.get("type", "default")), config.hidden_size // config.num_attention_heads
    f = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)  # within the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        f = (1 - share) * f / rope["factor"] + share * f
    elif kind != "default":
        raise ValueError(f"rope_type: got {kind!r}, wanted default or llama3")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor: got {rope['partial_rotary_factor']}, wanted 1")
    return f


def rotate(x, rope):
    """RoPE on (B, heads, T, HS): elements t and t + HS / 2 turn by rope = cos, sin, each (T, HS / 2)."""
    (a, b), (cos, sin) = wide(x).chunk(2, -1), rope
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class MtaAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, NH, NKV = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        HS, cq, ck = C // NH, config.kq_conv_query_size, config.kq_conv_key_size
        pre, post = config.head_mix_pre_softmax, config.head_mix_post_softmax
        conv, self.diff = layer in config.kq_conv_layers, config.attention_type == "diff"
        conv_pre, conv_post = conv and config.kq_conv_pre_softmax, conv and config.kq_conv_post_softmax
        self.config, self.layer, self.sizes = config, layer, (NH, NKV, HS)
        self.halo = (cq - 1) * (conv_pre + conv_post)  # how many queries a chunk reaches back
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.q_proj = nn.Linear(C, NH * HS, bias=False)
        self.k_proj = nn.Linear(C, NKV * HS, bias=False)
        self.v_proj = nn.Linear(C, NKV * HS, bias=False)
        self.o_proj = nn.Linear(NH * HS, C, bias=False)
        self.kq_conv = KeyQueryConv(NH, cq, ck) if conv_pre else nn.Identity()
        self.kq_conv_post = KeyQueryConv(NH, cq, ck) if conv_post else nn.Identity()
        self.head_mix_pre = HeadMix(NH, pre) if pre else nn.Identity()
        self.head_mix = HeadMix(NH, post) if post else nn.Identity()
        self.head_norm = nn.Identity() if config.head_norm == "none" else RMSNorm(2 * HS if self.diff else HS, 1e-5)
        self.head_gate = HeadGate(HS, C**-0.5) if config.head_gate else nn.Identity()
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2") if self.diff else ():
            setattr(self, name, nn.Parameter(torch.empty(HS)))

    def start(self):
        for vector in self.parameters(recurse=False):  # of diff
            nn.init.normal_(vector, std=0.1)

    def head_outputs(self, q, k, v, padding, start, end):
        """Outputs of queries start..end-1: (B, NH, end - start, HS), of diff (B, NH / 2, end - start, 2 HS). q: queries
        up to L, at least those that are read; k, v: of all L; padding: as of padding_of."""
        NH, NKV, HS = self.sizes
        first, before = max(0, start - self.halo), k.shape[2] - q.shape[2]
        k, v = (t[:, :, :end].repeat_interleave(NH // NKV, 1) for t in (k, v))
        queries = torch.arange(first, end, device=q.device)[:, None]
        visible = torch.arange(end, device=q.device) <= queries
        if padding is not None:
            visible = visible & padding[:, None, None, :end]

        scores = wide(q[:, :, first - before : end - before] @ k.transpose(2, 3)) / math.sqrt(HS)
        with in_fp32(scores):
            scores = self.head_mix_pre(self.kq_conv(scores.where(visible, 0)))
            maps = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1).where(visible, 0)
            maps = self.head_mix(self.kq_conv_post(maps).where(visible, 0)[:, :, start - first :])

            if self.diff:  # heads 2p and 2p + 1: the difference of their maps, on the values of both side by side
                positive = (wide(self.lambda_q1) * self.lambda_k1).sum().exp()
                negative = (wide(self.lambda_q2) * self.lambda_k2).sum().exp()
                maps = maps[:, 0::2] - (positive - negative + self.lambda_init) * maps[:, 1::2]
                v = torch.cat([v[:, 0::2], v[:, 1::2]], -1)
        out = self.head_norm(maps.to(v.dtype) @ v)
        if self.config.head_norm == "group_depth_scaled":
            out = out * (1 - self.lambda_init)
        return self.head_gate(out)

    def forward(self, x, rope, padding, cache):
        (B, T, _), (NH, NKV, HS) = x.shape, self.sizes
        q, k, v = (p(x).view(B, T, -1, HS).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.update(torch.cat([k, q], 1) if self.halo else k, v, self.layer)
            if self.halo:
                k, q = k.split([NKV, NH], 1)
        L, chunk, outputs = k.shape[2], self.config.query_chunk or T, []
        for start in range(L - T, L, chunk):
            part = (q, k, v, padding, start, min(start + chunk, L))
            if T > chunk and torch.is_grad_enabled():
                outputs.append(checkpoint(self.head_outputs, *part, use_reentrant=False))
            else:
                outputs.append(self.head_outputs(*part))
        return self.o_proj(torch.cat(outputs, 2).transpose(1, 2).reshape(B, T, -1))


class MtaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MtaLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MtaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MtaMLP(config)

    def forward(self, x, rope, padding, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, padding, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class MtaPreTrainedModel(PreTrainedModel):
    config_class = MtaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MtaLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        """Starts a module as the trainers do: in a new model, and where a checkpoint lacks its tensors (a LLaMA's under
        an MtaConfig), which have no values before. Some versions of transformers ask for modules too of which all was
        loaded; these tensors are marked, and stay."""
        own = list(module.parameters(recurse=False))
        if own and all(getattr(tensor, "_is_hf_initialized", False) for tensor in own):
            return
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = module.weight.shape[1] ** -0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif hasattr(module, "start"):
            module.start()


def padding_of(mask, length):
    """attention_mask -> None without padding, else (B, L), false where a token is padding."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != length:
        raise ValueError(f"attention_mask: got the shape {tuple(mask.shape)}, wanted (batch, {length})")
    if ((mask != 0) & (mask != 1)).any():  # numbers of several texts in a row, or what would be added to scores
        raise ValueError("attention_mask: wanted 1 for a token and 0 for padding, nothing else")
    mask = mask.bool()
    if mask.all():
        return None
    if (mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)).max() > 1:
        raise ValueError("attention_mask: padding between tokens, wanted it at the left or the right end")
    return mask


def returns_dict(model, wanted):
    return model.config.return_dict if wanted is None else wanted


class MtaModel(MtaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        config.check()  # from_pretrained may have changed a field
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MtaLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None,
                output_hidden_states=None, return_dict=None, cache=None, output_attentions=None):
        """cache: past_key_values by its newer name. Positions are counted from the first token, padding or not: RoPE
        depends on distances alone. output_attentions: PEFT passes it always, None if not asked for."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("wanted input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and (not self.training and self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"the cache is a {type(cache).__name__}, wanted a DynamicCache")
        if cache is not None and any(cache.is_sliding):
            raise ValueError("the cache drops tokens (a sliding window), wanted one that keeps all")
        if output_attentions or self.config.output_attentions:
            raise ValueError("output_attentions: no map is kept")
        if cache is not None and self.training and torch.is_grad_enabled() and self.layers[0].gradient_checkpointing:
            raise ValueError("gradient checkpointing puts keys into a cache twice, wanted use_cache=False")

        past, T = cache.get_seq_length() if cache is not None else 0, x.shape[1]
        padding = padding_of(attention_mask, past + T)
        places = torch.arange(past, past + T, dtype=torch.float64, device="cpu")  # whatever the default device is
        angles = places[:, None] * rope_frequencies(self.config)
        rope = [f(angles).to(x.device, wide(x).dtype) for f in (torch.cos, torch.sin)]
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = ()
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer: generate's assistant_early_exit
            states += (x,) if wanted else ()
            x = layer(x, rope, padding, cache)
        x = self.norm(x)
        out = BaseModelOutputWithPast(x, hidden_states=states + (x,) if wanted else None, **{CACHE: cache})
        return out if returns_dict(self, return_dict) else out.to_tuple()


class MtaForCausalLM(MtaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # of a model whose configuration ties them
    accepts_loss_kwargs = True  # so that the Trainer passes num_items_in_batch

    def __init__(self, config):
        super().__init__(config)
        if config.tie_word_embeddings and transformers.__version__ == "5.3.0":
            raise ImportError("transformers 5.3.0 does not load the tied head of such a model, wanted another version")
        self.model = MtaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, labels=None,
                use_cache=None, output_hidden_states=None, return_dict=None, logits_to_keep=0, cache=None,
                num_items_in_batch=None, output_attentions=None):
        """labels: the ids themselves, -100 where a token is no target; logits at t are of the token t + 1. The loss is
        the mean over the targets, or, of a step in several batches, their sum over num_items_in_batch."""
        out = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states, True, cache,
            output_attentions,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # the last, or which
        x = out.last_hidden_state if labels is not None else out.last_hidden_state[:, keep]
        logits, loss = self.lm_head(x), None
        if labels is not None:
            how = "mean" if num_items_in_batch is None else "sum"
            targets = labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(wide(logits[:, :-1]).flatten(0, 1), targets, reduction=how)
            if num_items_in_batch is not None:
                loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
        out = CausalLMOutputWithPast(loss, logits, hidden_states=out.hidden_states, **{CACHE: getattr(out, CACHE)})
        return out if returns_dict(self, return_dict) else out.to_tuple()

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, cache=None, attention_mask=None,
                                      inputs_embeds=None, use_cache=True, logits_to_keep=0, output_hidden_states=None,
                                      next_sequence_length=None, is_first_iteration=None, **others):
        """What forward takes, of the tokens that the cache does not hold yet; the same in all versions.
        next_sequence_length: how many these are; None: all after the cache that attention_mask has, or without one all
        that are given."""
        for name in ("output_attentions", "position_ids"):
            if others.get(name) is not None and others[name] is not False:
                raise ValueError(f"{name}: no map is kept, and positions are counted from the first token")
        cache = past_key_values if cache is None else cache
        past = cache.get_seq_length() if cache is not None else 0
        first = not past if is_first_iteration is None else is_first_iteration
        name, given = ("input_ids", input_ids)
        if inputs_embeds is not None and first:
            name, given = ("inputs_embeds", inputs_embeds)
        new = next_sequence_length
        if new is None:
            new = given.shape[1] if attention_mask is None else attention_mask.shape[1] - past
        if new < 1:
            raise ValueError(f"a cache of {past} tokens, wanted fewer than the text has, {past + new}")
        inputs = {name: given[:, -new:], "attention_mask": attention_mask, CACHE: cache, "use_cache": use_cache}
        return dict(inputs, logits_to_keep=logits_to_keep, output_hidden_states=output_hidden_states)
