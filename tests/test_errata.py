"""The errata page: numbers, references and switches, and what no chapter shows of it."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_NET, relative_error
from notebooks import NBS, ROOT, notebooks

from streamr1_ref.cache import CacheConfig
from streamr1_ref.dmd import guided, published_guidance, score_timesteps
from streamr1_ref.flow import FlowSchedule, apply_guidance
from streamr1_ref.objective import (
    METHODS,
    DistillationConfig,
    DistillationMethod,
    WeightingConfig,
    draw_micro_batch,
    judge_rollouts,
)
from streamr1_ref.published import WITHOUT_SWITCH, patch_saliency, switches_for
from streamr1_ref.reliability import rollout_weight
from streamr1_ref.rollout import StreamSampler, self_forcing_rollout
from streamr1_ref.saliency import pixel_saliency, pool_to_latent
from streamr1_ref.tiny.codec import load_codec
from streamr1_ref.tiny.models import tiny_models
from streamr1_ref.tiny.plane import Lab, Mixture
from streamr1_ref.tiny.reward import load_reward
from streamr1_ref.tiny.student import ode_path
from streamr1_ref.tiny.teacher import load_teacher
from streamr1_ref.training.trainer import Trainer
from streamr1_ref.transformer import WanConfig, WanTransformer
from streamr1_ref.utils.files import data_path
from streamr1_ref.utils.runtime import seeded
from streamr1_ref.wan.build import SMALL as SMALL_SIZES
from streamr1_ref.wan.build import random_reward

PAGE = NBS / "reference" / "errata.ipynb"
HEADING = re.compile(r"^## (\d+)\. (.+)$", re.M)
LINK = re.compile(r"\[(\w+), ([^\]]+)\]\(([\w./]+\.ipynb)#([^)\s]+)\)")
SWITCH = re.compile(r"^\*\*Switch\.\*\* (.+)$", re.M)
TEST = re.compile(r"`tests/(\w+\.py)::(\w+)`")
CITED = re.compile(r"[Ee]rrat(?:um|a)\b[^\d\n]{0,45}?(\d+)((?:(?:,| and|, and) \d+)*)")
TO_COME = "(test: to come)"
PROMPTS = ["a red 3 moving left", "a cyan 0 moving up"]


def entries(page: str) -> list[tuple[int, str, str]]:
    """(number, title, text) of every erratum on a page."""
    found = list(HEADING.finditer(page))
    ends = [m.start() for m in found[1:]] + [len(page)]
    return [(int(m[1]), m[2].strip(), page[m.end() : end]) for m, end in zip(found, ends)]


def headings(link: str) -> set[str]:
    """Headings of the notebook at a path relative to the page; none if it does not exist."""
    path = PAGE.parent / link
    cells = nbformat.read(path, as_version=4).cells if path.exists() else []
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    return set(re.findall(r"^#+ (.+?)\s*$", prose, re.M))


def functions(file: str) -> set[str]:
    path = ROOT / "tests" / file
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def complaints(page: str) -> list[str]:
    """What is wrong with an errata page: numbers, parts of an entry, references, the list."""
    found, wrong = entries(page), []
    numbers = [n for n, _, _ in found]
    if numbers != list(range(1, len(found) + 1)):
        wrong.append(f"numbers: expected 1 to {len(found)}, got {numbers}")
    listed = [(int(n), title) for n, title in re.findall(r"^\| (\d+) \| ([^|]+?) \|", page, re.M)]
    if listed != [(n, title) for n, title, _ in found]:
        wrong.append("the list at the top is not that of the entries")
    for n, _, text in found:
        for part in ("Published", "What follows", "Here", "Switch", "Shown"):
            if (times := text.count(f"**{part}.**")) != 1:
                wrong.append(f"{n}: {part}. {times} times")
        if not re.search(r"^\*(Run|Read|Computed)", text.strip()):
            wrong.append(f"{n}: does not begin with *Run*, *Read* or *Computed*")
        shown = text.partition("**Shown.**")[2]
        if not (
            LINK.search(shown) or TEST.search(shown) or TO_COME in shown or "Not shown" in shown
        ):
            wrong.append(f"{n}: shown nowhere")
        for chapter, heading, notebook, anchor in LINK.findall(text):
            if heading not in headings(notebook) or anchor != heading.replace(" ", "-"):
                wrong.append(f"{n}: {notebook} has no heading {heading!r} at #{anchor}")
            if not Path(notebook).stem.startswith(chapter):
                wrong.append(f"{n}: {notebook} is not chapter {chapter}")
        links = len(re.findall(r"\.ipynb", text)), len(LINK.findall(text))
        if links[0] != links[1]:
            wrong.append(f"{n}: {links[0]} notebooks, but {links[1]} links of the agreed form")
        wrong += [
            f"{n}: no test {file}::{name}"
            for file, name in TEST.findall(text)
            if name not in functions(file)
        ]
        if text.count("tests/test_") != len(TEST.findall(text)):
            wrong.append(f"{n}: a test that is not cited as `tests/FILE.py::NAME`")
    return wrong


def switches_said(text: str) -> tuple[list[str], str]:
    """The switches that an entry names, and its reason where it names none."""
    said = (SWITCH.search(text) or [""] * 2)[1]
    if said.startswith("None: "):
        return [], said.removeprefix("None: ")
    return re.findall(r"`([\w-]+)`", said), ""


def cited(text: str) -> set[int]:
    """Numbers of errata that a text names: "erratum 3", "errata 3 and 4", "errata ..., no. 3"."""
    return {int(n) for m in CITED.finditer(text) for n in re.findall(r"\d+", m[1] + m[2])}


def page() -> str:
    cells = nbformat.read(PAGE, as_version=4).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def test_numbers_and_references_of_the_page():
    assert len(entries(page())) >= 38 and complaints(page()) == []


def test_the_page_names_the_switches_of_the_table():
    """Both ways: each entry's switches are those of the table, or its reason is the table's."""
    table = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", page(), re.M)
    listed = {int(n): re.findall(r"`([\w-]+)`", names) for n, names in table}
    for n, _, text in entries(page()):
        names = [s.name for s in switches_for(n)]
        assert switches_said(text) == (names, "" if names else WITHOUT_SWITCH[n]), n
        assert listed[n] == names, n
    assert len(listed) == len(entries(page()))


def test_no_entry_waits_for_its_test():
    assert [n for n, _, text in entries(page()) if TO_COME in text] == []


def test_cited_numbers_are_on_the_page():
    known, seen = {n for n, _, _ in entries(page())}, set()
    texts = {
        p.name: p.read_text(encoding="utf-8")
        for folder in ("tests", "streamr1_ref")
        for p in (ROOT / folder).rglob("*.py")
        if p.name != "test_errata.py"
    }
    for path in notebooks():
        if path != PAGE:
            cells = nbformat.read(path, as_version=4).cells
            texts[path.name] = "\n".join(c.source for c in cells)
    for name, text in texts.items():
        assert cited(text) <= known, f"{name} cites {sorted(cited(text) - known)}"
        seen |= cited(text)
    assert {1, 13, 15} <= seen  # else the citations were not found


SINK = "A trap: in bfloat16 the sink stands still"
GOOD = f"""| 1 | First |
## 1. First
*Run.* **Published.** a **What follows.** b **Here.** c
**Switch.** None: d
**Shown.** [05, {SINK}](../05_sink_cache.ipynb#{SINK.replace(" ", "-")}),
`tests/test_errata.py::test_numbers_and_references_of_the_page`
"""


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("## 1.", "## 2.", "numbers"),
        ("| 1 | First", "| 1 | Second", "list at the top"),
        ("**Here.**", "", "Here. 0 times"),
        ("*Run.*", "", "begin with"),
        ("still]", "moves]", "no heading"),
        ("#A-trap", "#a-trap", "no heading"),
        ("../05_sink_cache.", "05_sink_cache.", "no heading"),
        ("../05_sink_cache.", "../05_sink.", "no heading"),
        ("[05, A", "[06, A", "is not chapter 06"),
        ("**Switch.**", "", "Switch. 0 times"),
        ("::test_numbers", "::test_no", "no test"),
        ("test_errata.py:", "test_er.py:", "no test"),
        ("`tests", "tests", "not cited as"),
        ("[05, A", "[A", "agreed form"),
    ],
)
def test_a_wrong_page_is_seen(old, new, says):
    assert complaints(GOOD) == [] and old in GOOD
    assert any(says in text for text in complaints(GOOD.replace(old, new)))


def test_citations_are_found_in_their_forms():
    assert cited("see erratum 3; errata 4, 5 and 6") == {3, 4, 5, 6}
    assert cited("(errata of the published code, no. 13)") == {13}
    assert cited("[erratum 19](errata.ipynb), no errata here\n 7, Errata page") == {19}


# what the entries say, where no other test shows it


def exact_critic(target):
    """The flow of a critic that knows the distribution `target`."""
    return lambda x_t, sigma: (x_t - target.x0(x_t, sigma)) / sigma.view(-1, 1, 1, 1, 1)


def test_positions_do_not_depend_on_the_length_of_a_stream():
    """Erratum 4: the block behind six frames is the same in block 3 and in block 40.

    One layer, whose keys depend on the remembered frames alone, and no sink: what differs between a
    short and a long stream with the same last six frames could only be their positions.
    """
    torch.manual_seed(0)
    net = WanTransformer(replace(SMALL_NET, num_layers=1)).requires_grad_(False)
    sampler = StreamSampler(net, steps=(1000,), cache=CacheConfig(sink="none"))
    prompt, past = torch.randn(1, 5, 16), torch.randn(1, 117, 4, 4, 6, generator=seeded(0))
    noise = torch.randn(1, 3, 4, 4, 6, generator=seeded(1))
    after = [sampler.sample(noise, prompt, initial=past[:, -n:])[:, -3:] for n in (6, 117)]
    assert torch.equal(*after)
    assert not torch.equal(after[0], sampler.sample(noise, prompt, initial=past[:, :6])[:, -3:])


def test_a_positive_weight_keeps_the_fixed_point():
    """Erratum 5: where student and teacher are equal the weighted gradient is 0, elsewhere not."""
    target = Mixture(torch.tensor([[1.5, 0.0], [-1.5, 0.0]]), 0.3)
    moved, lab = Mixture(target.means + 0.5, 0.3), Lab(target)
    points = target.sample(500, torch.Generator().manual_seed(0))
    weight = lambda x: rollout_weight(x.flatten(1)[:, 0]).view(-1, 1, 1, 1, 1)
    lab.critic = exact_critic(target)
    assert (weight(points) * lab.gradient(points)).abs().mean() < 1e-3
    lab.critic = exact_critic(moved)
    assert (weight(points + 0.5) * lab.gradient(points + 0.5)).abs().mean() > 1.0


class Counted(torch.nn.Module):
    """A reward model that counts its forward passes and the clips in them."""

    def __init__(self, model):
        super().__init__()
        self.model, self.axes, self.batches = model, model.axes, []

    def forward(self, pixels, prompts):
        self.batches.append(len(pixels))
        return self.model(pixels, prompts)


def test_one_forward_pass_gives_scores_and_saliency_of_all_clips():
    """Errata 6 and 7: one pass over the whole batch; each clip has the scores that it has alone."""
    codec = load_codec(data_path("tiny_codec.safetensors"))
    latents = torch.randn(2, 3, 16, 8, 8, generator=seeded(0))
    counted = Counted(load_reward())
    both = judge_rollouts(counted, codec, latents, PROMPTS, WeightingConfig())
    assert counted.batches == [2]
    for i in range(2):
        alone = judge_rollouts(
            counted, codec, latents[i : i + 1], PROMPTS[i : i + 1], WeightingConfig()
        )
        assert torch.allclose(alone.reward, both.reward[i : i + 1], atol=1e-4)
        assert torch.allclose(alone.intra_weight, both.intra_weight[i : i + 1], atol=1e-3)
    assert (both.reward[0] - both.reward[1]).abs() > 0.01


def test_saliency_is_per_pixel_where_the_published_one_is_per_patch():
    """Erratum 8: the published map has one value for a patch, whatever happens inside it."""
    pixels = torch.rand(1, 9, 3, 32, 32, generator=seeded(0))
    _, maps = pixel_saliency(load_reward(), pixels, PROMPTS[:1])
    assert all(m.shape == (1, 9, 32, 32) for m in maps.values())
    inside = maps["VQ"][0, 5, :4, :4]
    assert inside.max() > 1.05 * inside.min()
    gradient = torch.randn(1, 1176, generator=seeded(1))  # 3 colours x 2 frames x 14 x 14 pixels
    shuffled = gradient[:, torch.randperm(1176, generator=seeded(2))]
    maps = [patch_saliency(g, (1, 1, 1)) for g in (gradient, shuffled)]
    assert maps[0].numel() == 1 and torch.allclose(*maps)


def test_a_step_decodes_once_and_encodes_nothing():
    """Erratum 9."""

    class Codec:
        calls = []

        def __init__(self, codec):
            self.codec = codec

        def __getattr__(self, name):
            if name in ("encode", "decode"):
                self.calls.append(name)
            return getattr(self.codec, name)

    models = tiny_models()
    run = DistillationMethod(
        replace(models, codec=Codec(models.codec)),
        PROMPTS,
        METHODS["Stream-R1"],
        DistillationConfig(micro_batch_size=1, frames=3, critic_steps=1),
    )
    assert "skipped" not in Trainer(run).step() and Codec.calls == ["decode"]


def test_the_table_of_shift_8_is_nearly_that_of_shift_5():
    """Erratum 12: levels are looked up by value, so the tables differ by half a step at most."""
    five, eight = FlowSchedule(shift=5.0), FlowSchedule(shift=8.0)
    t = torch.linspace(20, 980, 200)
    difference = (five.sigma(t) - eight.sigma(t)).abs()
    assert 0 < difference.max() < 0.01
    exact = [FlowSchedule(shift, lookup="exact").sigma(t) for shift in (5.0, 8.0)]
    assert torch.equal(*exact)


class Listening(WanTransformer):
    """A network that writes down what it is asked: frames, timesteps and latents."""

    def __init__(self, cfg: WanConfig):
        super().__init__(cfg)
        self.heard = []

    def forward(self, x_t, timestep, *args, **kwargs):
        self.heard.append((x_t.shape[1], timestep.tolist(), x_t))
        return super().forward(x_t, timestep, *args, **kwargs)


def test_scores_have_one_timestep_a_clip_and_the_student_one_a_block():
    """Erratum 13."""
    assert score_timesteps(FlowSchedule(), 4, seeded(0)).shape == (4,)
    net, noise = Listening(SMALL_NET), torch.zeros(1, 6, 4, 4, 6)
    how = {"steps": (1000, 250), "exit_steps": [1], "generator": seeded(0)}
    self_forcing_rollout(net, noise, torch.zeros(1, 5, 16), FlowSchedule(), **how)
    # two steps and the finished block, for each block
    assert [(frames, t) for frames, t, _ in net.heard] == 2 * [
        (3, [1000.0]),
        (3, [625.0]),
        (3, [0.0]),
    ]


def test_guidance_of_the_published_code_is_one_less():
    """Erratum 15."""
    cond, uncond = torch.randn(2, 1, 2, 3, 4, 4, generator=seeded(0))
    for published in (0.0, 1.0, 3.0):
        usual = apply_guidance(cond, uncond, guidance_scale=1 + published)
        assert relative_error(guided(cond, uncond, published), usual) < 1e-6
        assert published_guidance(1 + published) == published


def test_only_grids_with_the_students_steps_are_taken():
    """Erratum 18: of 1 to 60 Euler steps, those that are multiples of 4."""
    teacher, good = load_teacher(), []
    teacher.sample = lambda prompts, generator, num_steps, scale, on_step: [
        on_step(i, torch.zeros(1)) for i in range(num_steps + 1)
    ]
    for n in range(1, 61):
        try:
            ode_path(teacher, PROMPTS, seeded(0), num_steps=n)
            good.append(n)
        except ValueError as error:
            assert "multiple of 4" in str(error)
    assert good == list(range(4, 61, 4))


def test_the_published_patch_order_moves_nearly_all_cells():
    """Erratum 19, from the order of patches alone: 2 x 2 blocks, read as rows of 42 cells."""
    h, w = 24, 42
    place = torch.arange(h * w).view(h // 2, 2, w // 2, 2).permute(0, 2, 1, 3).flatten()
    true_column, column = place % w, torch.arange(h * w) % w
    assert (place == torch.arange(h * w)).float().mean().item() == pytest.approx(0.05, abs=0.005)
    assert (true_column - column).abs().float().mean().item() == pytest.approx(10.5, abs=0.1)


def test_training_noise_of_the_clean_context():
    """Erratum 22: in the table timestep 0 is its last entry; ours remembers the block as it is."""
    assert FlowSchedule().sigma(torch.zeros(1)).item() == pytest.approx(0.005, abs=1e-4)
    net, noise = Listening(SMALL_NET), torch.randn(1, 3, 4, 4, 6, generator=seeded(0))
    made = self_forcing_rollout(net, noise, torch.zeros(1, 5, 16), FlowSchedule(), exit_steps=[0])
    _, timestep, remembered = net.heard[-1]
    assert timestep == [0.0] and torch.equal(remembered, made.latents)


def test_a_new_prompt_is_remembered_block_by_block():
    """Erratum 24: re-caching leaves what a stream under the new prompt would have had."""
    torch.manual_seed(0)
    net = WanTransformer(SMALL_NET).requires_grad_(False)
    old, new = torch.randn(2, 1, 5, 16, generator=seeded(1))

    def next_block(recache: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The block after a switch, and that of a stream under the new prompt from the start."""
        generator = seeded(2)
        stream = StreamSampler(net).stream(old, generator)
        past = torch.cat([next(stream) for _ in range(3)], 1)
        fresh = StreamSampler(net).stream(
            new, seeded(2).set_state(generator.get_state()), initial=past
        )
        stream.switch_prompt(new, recache=recache)
        return next(stream), [next(fresh) for _ in range(4)][-1]

    assert torch.equal(*next_block(recache=True))
    assert relative_error(*next_block(recache=False)) > 1e-3


def test_the_reward_of_a_rollout_is_the_mean_of_its_axes():
    """Erratum 25: beta 2 on the mean is beta 2/3 on the sum."""
    codec = load_codec(data_path("tiny_codec.safetensors"))
    latents = torch.randn(2, 3, 16, 8, 8, generator=seeded(0))
    judged = judge_rollouts(load_reward(), codec, latents, PROMPTS, METHODS["inter"])
    total = sum(judged.rewards.values()).double()
    assert torch.allclose(judged.reward, total / 3)
    assert torch.allclose(rollout_weight(judged.reward, 2.0), rollout_weight(total, 2 / 3))


def test_bicubic_resizing_overshoots():
    """Erratum 28: an edge from 0 to 1 leaves [0,1] when it is resized as published."""
    edge = torch.zeros(1, 1, 480, 832)
    edge[..., 416:] = 1
    resized = F.interpolate(edge, size=(336, 588), mode="bicubic", antialias=True)
    assert resized.min() < -0.005 and resized.max() > 1.005


def layer_calls(training: bool) -> int:
    """Forward calls of a layer in one forward and backward pass, checkpointing switched on."""
    from transformers import Qwen2Config, Qwen2Model

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = Qwen2Model(Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=8)).train(training)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    calls = []
    model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    inputs = torch.randn(1, 4, 16, requires_grad=True)
    model(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum().backward()
    return len(calls)


def test_eval_switches_activation_checkpointing_off():
    """Erratum 31, of transformers: the setting stays on; in eval mode nothing is computed again."""
    assert (layer_calls(training=True), layer_calls(training=False)) == (2, 1)


def test_the_balance_window_gets_one_row_a_step():
    """Erratum 32: whatever the number of micro-batches, with the mean over all of them."""
    run = DistillationMethod(
        tiny_models(),
        PROMPTS,
        METHODS["Stream-R1"],
        DistillationConfig(micro_batch_size=1, micro_batches=3, frames=3, critic_steps=0),
    )
    record = Trainer(run).step()
    assert len(run.balance.history) == 1
    means = [record[axis] for axis in ("VQ", "MQ", "TA")]
    assert run.balance.history[0] == pytest.approx(means, abs=1e-5)


def test_seed_0_is_a_seed():
    """Erratum 33: two runs with seed 0 draw the same prompts and the same noise."""
    draw = lambda seed: draw_micro_batch(DistillationConfig(seed=seed), PROMPTS * 8, 3)
    noise = lambda drawn: torch.randn(9, generator=drawn[0])
    first, second, other = draw(0), draw(0), draw(1)
    assert first[1:] == second[1:]
    noises = [noise(drawn) for drawn in (first, second, other)]
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])


def test_trilinear_pooling_moves_saliency_to_other_frames():
    """Erratum 36: causal pooling keeps a latent frame's saliency there, trilinear a part of it."""
    spot = torch.zeros(1, 33, 32, 32)
    spot[0, 5:9, 8:12, 20:24] = 1  # the four video frames of latent frame 2
    causal, stretched = (
        pool_to_latent(spot, (9, 8, 8), causal=c)[0].sum((1, 2)) for c in (True, False)
    )
    assert causal.nonzero().flatten().tolist() == [2]
    assert stretched[2] < 0.7 * stretched.sum()


def test_scores_are_in_float32_whatever_the_model_computes_in():
    """Erratum 34: the head of a bfloat16 reward model, and what is behind it, are in float32."""
    torch.manual_seed(0)
    model = random_reward(SMALL_SIZES, dtype=torch.bfloat16)
    pixels = torch.rand(1, 2, 3, 28, 56, generator=seeded(0))
    with torch.no_grad():
        scores = torch.cat(list(model(pixels, ["a red fox"]).values()))
    assert model.model.dtype == torch.bfloat16 and model.head.weight.dtype == torch.float32
    assert scores.dtype == torch.float32 and not torch.equal(scores.bfloat16().float(), scores)


def test_the_critic_is_trained_before_the_student():
    """Erratum 38."""
    cfg, order = DistillationConfig(micro_batch_size=1, frames=3, critic_steps=2), []
    trainer = Trainer(DistillationMethod(tiny_models(), PROMPTS, cfg=cfg))
    for name, optimizer in trainer.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: order.append(name))
    assert "skipped" not in trainer.step() and order == ["critic", "critic", "student"]
