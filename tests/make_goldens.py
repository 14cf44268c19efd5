"""What diffusers answers to tests/reference_cases.py.

    python -m tests.make_goldens

records a part of it in tests/goldens/diffusers.npz, so that it is checked where torch is absent.
Needs requirements-parity.txt.
"""

import inspect
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers import scheduling_ddpm

from cmd_jax.diffusion import Process
from tests import reference_cases as cases

GOLDENS = Path(__file__).parent / 'goldens' / 'diffusers.npz'


def scheduler(kind, process: Process, options: dict, **kwargs):
    """A diffusers scheduler of the same process and options."""
    if 'clip_sample' in inspect.signature(kind).parameters:
        clip = options.get('clip')
        kwargs |= dict(clip_sample=clip is not None, clip_sample_range=clip or 1.0)
    return kind(
        num_train_timesteps=process.steps,
        beta_schedule=cases.SCHEDULES[process.schedule],
        beta_start=process.betas[0],
        beta_end=process.betas[-1],
        prediction_type={'epsilon': 'epsilon', 'v': 'v_prediction'}[process.prediction],
        timestep_spacing=options.get('spacing', 'leading'),
        steps_offset=options.get('offset', 0),
        **kwargs,
    )


def ddim(process: Process, options: dict, keys=None) -> np.ndarray:
    """DDIMScheduler's result with the toy network, whose noise is that of our keys."""
    ddim = scheduler(
        diffusers.DDIMScheduler,
        process,
        options,
        set_alpha_to_one=options.get('final_alpha_one', True),
    )
    ddim.set_timesteps(options['steps'])
    x = torch.from_numpy(cases.draw(cases.SHAPE))
    for i, t in enumerate(ddim.timesteps):
        noise = None if keys is None else torch.from_numpy(cases.step_noise(keys, i))
        x = ddim.step(
            toy_network(x, t),
            int(t),
            x,
            eta=options.get('eta', 0.0),
            use_clipped_model_output=True,
            variance_noise=noise,
        ).prev_sample
    return x.numpy()


def ddpm(process: Process, options: dict, keys) -> np.ndarray:
    """DDPMScheduler's result with the toy network and the noise of our keys."""
    ddpm = scheduler(
        diffusers.DDPMScheduler,
        process,
        options,
        variance_type='learned_range' if process.learn_sigma else 'fixed_small',
    )
    ddpm.set_timesteps(options['steps'])
    x = torch.from_numpy(cases.draw(cases.SHAPE)).permute(0, 3, 1, 2)  # it splits the second axis
    for i, t in enumerate(ddpm.timesteps):
        output = toy_network(x.permute(0, 2, 3, 1), t, process.learn_sigma).permute(0, 3, 1, 2)
        noise = torch.from_numpy(cases.step_noise(keys, i)).permute(0, 3, 1, 2)
        with mock.patch.object(scheduling_ddpm, 'randn_tensor', lambda *_, n=noise, **__: n):
            x = ddpm.step(output, int(t), x).prev_sample
    return x.permute(0, 2, 3, 1).numpy()


MULTISTEP = {
    'dpmpp_2m': diffusers.DPMSolverMultistepScheduler,
    'unipc': diffusers.UniPCMultistepScheduler,
}


def multistep_timesteps(process: Process, options: dict) -> np.ndarray:
    them = scheduler(MULTISTEP[options['sampler']], process, options)
    them.set_timesteps(options['steps'])
    return them.timesteps.numpy()


def rescaled(conditional, null, scale: float, rescale: float) -> np.ndarray:
    """What Stable Diffusion's pipeline makes of the two branches."""
    conditional, null = torch.from_numpy(conditional), torch.from_numpy(null)
    guided = null + scale * (conditional - null)
    return rescale_noise_cfg(guided, conditional, guidance_rescale=rescale).numpy()


def multistep(process: Process, options: dict) -> np.ndarray:
    """The result of diffusers' scheduler of that name with the toy network."""
    them = scheduler(MULTISTEP[options['sampler']], process, {'spacing': 'linspace'} | options)
    them.set_timesteps(options['steps'])
    x = torch.from_numpy(cases.draw(cases.SHAPE))
    for t in them.timesteps:
        x = them.step(toy_network(x, t), t, x).prev_sample
    return x.numpy()


def toy_network(x: torch.Tensor, t: torch.Tensor, learn_sigma: bool = False) -> torch.Tensor:
    t = np.full(len(x), t, np.float32)
    return torch.from_numpy(cases.toy_network(x.numpy(), t, np, learn_sigma).astype(np.float32))


def dit(params: dict) -> np.ndarray:
    """DiTTransformer2DModel's output with the weights of our ContentDiT, [3, 16, 16, 8]."""
    heads, dim, patch = cases.DIT['heads'], cases.DIT['dim'], cases.DIT['patch']
    channels = cases.DIT['channels']
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=cases.DIT['depth'],
        sample_size=cases.SIZE,
        patch_size=patch,
        num_embeds_ada_norm=cases.DIT['num_classes'],
        norm_eps=1e-6,
    ).eval()
    weights = {}

    def put(name, linear, index=...):
        weights[f'{name}.weight'] = linear['kernel'][index].T
        weights[f'{name}.bias'] = linear['bias'][index]

    # Our patch vectors are (row, column, channel).
    kernel = params['patch_embed']['kernel'].reshape(patch, patch, channels, dim)
    weights['pos_embed.proj.weight'] = kernel.transpose(3, 2, 0, 1)
    weights['pos_embed.proj.bias'] = params['patch_embed']['bias']
    trunk = params['trunk']
    blocks = trunk['blocks']
    for i in range(cases.DIT['depth']):
        to = f'transformer_blocks.{i}'
        # Each block has its own embedding of timestep and label; ours is one for all.
        embedding = f'{to}.norm1.emb'
        put(f'{embedding}.timestep_embedder.linear_1', params['time_embed']['hidden'])
        put(f'{embedding}.timestep_embedder.linear_2', params['time_embed']['out'])
        label = params['label_embed']['embedding']
        weights[f'{embedding}.class_embedder.embedding_table.weight'] = label
        put(f'{to}.norm1.linear', blocks['modulation'], i)
        # Our columns are (head, query | key | value, channel).
        qkv = blocks['attention']['qkv']
        kernel = qkv['kernel'][i].reshape(dim, heads, 3, -1)
        bias = qkv['bias'][i].reshape(heads, 3, -1)
        for j, name in enumerate(('to_q', 'to_k', 'to_v')):
            weights[f'{to}.attn1.{name}.weight'] = kernel[:, :, j].reshape(dim, dim).T
            weights[f'{to}.attn1.{name}.bias'] = bias[:, j].reshape(dim)
        put(f'{to}.attn1.to_out.0', blocks['attention']['out'], i)
        put(f'{to}.ff.net.0.proj', blocks['mlp']['up'], i)
        put(f'{to}.ff.net.2', blocks['mlp']['down'], i)
    put('proj_out_1', trunk['final_modulation'])
    put('proj_out_2', trunk['head'])
    weights = {k: torch.from_numpy(np.array(v, copy=True)) for k, v in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # The position table is computed on both sides, and so compared by the output too.
    assert (set(missing) <= {'pos_embed.pos_embed'}) and not unexpected, (missing, unexpected)
    for block in model.transformer_blocks:
        # diffusers divides the exponent of the frequencies by half - 1; the published DiT and ours
        # by half.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, label = map(torch.from_numpy, cases.dit_inputs())
    with torch.no_grad():
        return model(x.permute(0, 3, 1, 2), t, label).sample.permute(0, 2, 3, 1).numpy()


def main():
    arrays = {'versions': np.array([f'diffusers {diffusers.__version__}', torch.__version__])}
    for schedule in cases.SCHEDULES:
        alphas = scheduler(diffusers.DDIMScheduler, Process(schedule=schedule), {}).alphas_cumprod
        arrays[f'alphas_cumprod/{schedule}'] = alphas.numpy()[cases.TIMES]
    for name, (process, options) in cases.GOLDEN_CASES.items():
        draw = multistep if options.get('sampler') in MULTISTEP else ddim
        arrays[f'sample/{name}'] = draw(process, options)
    arrays['dit'] = dit(cases.dit_params())[cases.DIT_PART]
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **arrays)
    print(f'{GOLDENS}: {GOLDENS.stat().st_size} bytes')


if __name__ == '__main__':
    main()
