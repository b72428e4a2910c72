"""Denoisers that are diffusers' own: latent diffusion's U-Net, DiT and PixArt-alpha. Weights lie under `net`, by diffusers'
names; what is ours is the interface, the initialisation, and positions without a buffer.

B batch, C latent channels, H W latent sides, D width.
"""

from itertools import islice

import torch.nn.functional as F
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from trainer.config import DiTConfig, PixArtConfig, UNetConfig
from trainer.errors import UserError
from trainer.models.condition import Condition
from trainer.models.denoisers import Denoiser, init_transformer
from trainer.models.layers import PatchEmbedding, modulated_norm, unpatchify


class UNet(Denoiser):
    """Rombach et al. 2022. The text is read by cross-attention; its pooled form is not."""

    def __init__(self, config: UNetConfig, *, latent_channels: int, token_width: int) -> None:
        super().__init__(
            latent_channels=latent_channels, latent_multiple=config.latent_multiple, token_width=token_width
        )
        levels = config.attention_levels
        self.net = UNet2DConditionModel(
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock2D" if level else "DownBlock2D" for level in levels),
            up_block_types=tuple("CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(levels)),
            cross_attention_dim=token_width,
            attention_head_dim=tuple(  # diffusers' name for the number of heads
                channels // config.head_dim for channels in config.block_out_channels
            ),
            norm_num_groups=config.norm_num_groups,
        )

    def units(self) -> list[nn.Module]:
        """Residual blocks and transformers, as latent diffusion recomputes them: a whole level holds too much at once."""
        return [part for part in self.net.modules() if isinstance(part, ResnetBlock2D | Transformer2DModel)]

    def init_weights(self) -> None:
        """torch's own, and zeros where a residual branch or the output ends, as latent diffusion."""
        for part in self.net.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                part.reset_parameters()
        ends: list[nn.Module] = [self.net.conv_out]
        ends += [
            unit.get_submodule("conv2" if isinstance(unit, ResnetBlock2D) else "proj_out") for unit in self.units()
        ]
        for end in ends:
            for parameter in end.parameters():
                nn.init.zeros_(parameter)

    @property
    def num_blocks(self) -> int:
        """The way down, a block a level; the middle; and the way up."""
        return len(self.net.down_blocks) + 1 + len(self.net.up_blocks)

    def cut(self, num_blocks: int) -> None:
        net, num_down = self.net, len(self.net.down_blocks)
        net.down_blocks = net.down_blocks[:num_blocks]
        net.up_blocks = net.up_blocks[: max(0, num_blocks - num_down - 1)]
        if num_blocks <= num_down:
            net.mid_block = None

    def forward(self, zt_BCHW: Tensor, t_B: Tensor, condition: Condition, num_blocks: int | None = None) -> Tensor:
        self.check_inputs(zt_BCHW, condition)
        if num_blocks is not None:
            return self._features(zt_BCHW, t_B, condition, num_blocks)
        out: Tensor = self.net(
            zt_BCHW, t_B, condition.tokens_BLT, encoder_attention_mask=condition.mask_BL, return_dict=False
        )[0]
        return out

    def _features(self, zt_BCHW: Tensor, t_B: Tensor, condition: Condition, num_blocks: int) -> Tensor:
        """As diffusers' own forward, as far as these blocks. (B, D, h, w), of the block's level."""
        net = self.net
        temb_BE = net.time_embedding(net.get_time_embed(zt_BCHW, t_B))
        bias_B1L = attention_bias(condition.mask_BL, zt_BCHW)
        text = {"encoder_hidden_states": condition.tokens_BLT, "encoder_attention_mask": bias_B1L}

        def reading(block: nn.Module) -> dict[str, Tensor | None]:
            return text if getattr(block, "has_cross_attention", False) else {}

        x_BDHW = net.conv_in(zt_BCHW)
        skipped = [x_BDHW]
        for block in islice(net.down_blocks, num_blocks):
            x_BDHW, of_block = block(x_BDHW, temb_BE, **reading(block))
            skipped += of_block
        num_blocks -= len(net.down_blocks)
        if num_blocks > 0:
            x_BDHW = net.mid_block(x_BDHW, temb_BE, **reading(net.mid_block))
        for block in islice(net.up_blocks, max(0, num_blocks - 1)):
            count = len(block.resnets)
            x_BDHW = block(x_BDHW, tuple(skipped[-count:]), temb_BE, **reading(block))
            del skipped[-count:]
        return x_BDHW


def attention_bias(mask_BL: Tensor | None, like: Tensor) -> Tensor | None:
    """What diffusers' blocks take in a mask's place, (B, 1, L): added to what each token is attended with."""
    return None if mask_BL is None else ((1 - mask_BL.to(like.dtype)) * -10_000.0)[:, None]


class GivenCondition(nn.Module):
    """In a block of diffusers' DiT, where it would embed time and class anew: hands on what was embedded once."""

    def forward(self, timestep: Tensor, class_labels: None, hidden_dtype: object = None) -> Tensor:
        return timestep


class DiT(Denoiser):
    """Peebles & Xie 2023. Time and class are embedded once for all blocks, as the authors do; diffusers has a copy of the
    same two embedders in every block, which would part in training."""

    def __init__(self, config: DiTConfig, *, latent_channels: int, num_classes: int | None) -> None:
        super().__init__(latent_channels=latent_channels, latent_multiple=config.latent_multiple, token_width=None)
        if num_classes is None:
            raise UserError("task.text: dit knows classes alone, and this text encoder has none; take kind classes")
        self.num_classes = num_classes
        self.patch_size = config.patch_size
        self.net = DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_layers=config.num_blocks,
            sample_size=config.base_grid * config.patch_size,
            patch_size=config.patch_size,
            num_embeds_ada_norm=num_classes,
        )
        self.net.pos_embed = PatchEmbedding(latent_channels, config.width, config.patch_size, config.base_grid)
        self.embedder = CombinedTimestepLabelEmbeddings(num_classes, config.width)
        # The table has its row for no class; which samples go without one is the run's own draw, not the layer's.
        self.embedder.class_embedder.dropout_prob = 0.0
        for block in self.net.transformer_blocks:
            block.norm1.emb = GivenCondition()

    def units(self) -> list[nn.Module]:
        return list(self.net.transformer_blocks)

    def init_weights(self) -> None:
        """The authors': Xavier, and zeros where a block's modulation or the output begins."""
        init_transformer(self)
        time = self.embedder.timestep_embedder
        for weight in (self.embedder.class_embedder.embedding_table.weight, time.linear_1.weight, time.linear_2.weight):
            nn.init.normal_(weight, std=0.02)
        zeros = [block.norm1.linear for block in self.net.transformer_blocks]
        for linear in (*zeros, self.net.proj_out_1, self.net.proj_out_2):
            nn.init.zeros_(linear.weight)

    @property
    def num_blocks(self) -> int:
        return len(self.net.transformer_blocks)

    def cut(self, num_blocks: int) -> None:
        self.net.transformer_blocks = self.net.transformer_blocks[:num_blocks]

    def forward(self, zt_BCHW: Tensor, t_B: Tensor, condition: Condition, num_blocks: int | None = None) -> Tensor:
        """As diffusers' own forward, which knows squares alone."""
        self.check_inputs(zt_BCHW, condition)
        if condition.labels_B is None:
            raise UserError("task.text: dit knows classes alone, and the condition has no labels; take kind classes")
        x_BND = self.net.pos_embed(zt_BCHW)
        c_BD = self.embedder(t_B, condition.labels_B, hidden_dtype=x_BND.dtype)
        for block in islice(self.net.transformer_blocks, num_blocks):
            x_BND = block(x_BND, timestep=c_BD)
        if num_blocks is not None:
            return x_BND
        shift_BD, scale_BD = self.net.proj_out_1(F.silu(c_BD)).chunk(2, dim=-1)
        out = self.net.proj_out_2(modulated_norm(x_BND, shift_BD, scale_BD))
        rows, columns = (side // self.patch_size for side in zt_BCHW.shape[-2:])
        return unpatchify(out, rows, columns, self.patch_size)

    def diffusers_state(self) -> dict[str, Tensor]:
        """State dict for a `DiTTransformer2DModel`: every block with its copy of the embedders."""
        state = dict(self.net.state_dict())
        for name, tensor in self.embedder.state_dict().items():
            state |= {f"transformer_blocks.{i}.norm1.emb.{name}": tensor for i in range(len(self.units()))}
        return state


class PixArt(Denoiser):
    """Chen et al. 2024. The text is read by cross-attention; its pooled form is not, nor are sizes and aspect ratios."""

    def __init__(self, config: PixArtConfig, *, latent_channels: int, token_width: int) -> None:
        super().__init__(
            latent_channels=latent_channels, latent_multiple=config.latent_multiple, token_width=token_width
        )
        self.net = PixArtTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_layers=config.num_blocks,
            cross_attention_dim=config.width,
            sample_size=config.base_grid * config.patch_size,
            patch_size=config.patch_size,
            interpolation_scale=1,
            use_additional_conditions=False,
            caption_channels=token_width,
        )
        self.net.pos_embed = PatchEmbedding(latent_channels, config.width, config.patch_size, config.base_grid)

    def units(self) -> list[nn.Module]:
        return list(self.net.transformer_blocks)

    def init_weights(self) -> None:
        """The authors': Xavier, small normal embedders, random tables, zeros where cross-attention and the output end."""
        init_transformer(self)
        net, width = self.net, self.net.inner_dim
        time, caption = net.adaln_single.emb.timestep_embedder, net.caption_projection
        for linear in (time.linear_1, time.linear_2, net.adaln_single.linear, caption.linear_1, caption.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        for table in (net.scale_shift_table, *(block.scale_shift_table for block in net.transformer_blocks)):
            nn.init.normal_(table, std=width**-0.5)
        for linear in (net.proj_out, *(block.attn2.to_out[0] for block in net.transformer_blocks)):
            nn.init.zeros_(linear.weight)

    @property
    def num_blocks(self) -> int:
        return len(self.net.transformer_blocks)

    def cut(self, num_blocks: int) -> None:
        self.net.transformer_blocks = self.net.transformer_blocks[:num_blocks]

    def forward(self, zt_BCHW: Tensor, t_B: Tensor, condition: Condition, num_blocks: int | None = None) -> Tensor:
        self.check_inputs(zt_BCHW, condition)
        if num_blocks is not None:
            return self._features(zt_BCHW, t_B, condition, num_blocks)
        out: Tensor = self.net(
            zt_BCHW,
            encoder_hidden_states=condition.tokens_BLT,
            timestep=t_B,
            encoder_attention_mask=condition.mask_BL,
            return_dict=False,
        )[0]
        return out.contiguous()  # of patches of one pixel it is a view, which sharding warns of

    def _features(self, zt_BCHW: Tensor, t_B: Tensor, condition: Condition, num_blocks: int) -> Tensor:
        """As diffusers' own forward, as far as these blocks. (B, N, D)."""
        x_BND = self.net.pos_embed(zt_BCHW)
        modulation_BM, _ = self.net.adaln_single(t_B, None, batch_size=len(t_B), hidden_dtype=x_BND.dtype)
        text_BLD = self.net.caption_projection(condition.tokens_BLT)
        bias_B1L = attention_bias(condition.mask_BL, zt_BCHW)
        for block in islice(self.net.transformer_blocks, num_blocks):
            x_BND = block(
                x_BND,
                encoder_hidden_states=text_BLD,
                encoder_attention_mask=bias_B1L,
                timestep=modulation_BM,
            )
        return x_BND
