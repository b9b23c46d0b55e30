"""Properties of text.py and of sampling.py's solvers that need no weights.  pytest tests/test_text_solver.py"""
import math

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors

from sampling import make_solver, snr
from text import TextConfig, TextEncoder, Tokenizer, clean_prompt, encode_prompt, position_buckets

# ----------------------------------------------------------------------------------------------------------------- solvers

def run(solver, velocity, x, steps=None):
    """Follow a trajectory; velocity(x, sigma)."""
    for i in range(steps or len(solver.timesteps)):
        x = solver.step(velocity(x, solver.levels[i]), i, x)
    return x


@pytest.mark.parametrize("name, first", [("unipc", 999), ("dpm++", 1000), ("euler", 1000)])
@pytest.mark.parametrize("steps, shift", [(1, 3), (2, 3), (40, 12), (50, 1)])
def test_schedule(name, first, steps, shift):
    solver = make_solver(name, steps, shift)
    assert solver.sigmas.shape == (steps + 1,) and solver.timesteps.shape == (steps,)
    assert solver.sigmas.dtype == torch.float32 and solver.timesteps.dtype == torch.int64
    assert solver.timesteps[0] == first and solver.sigmas[-1] == 0 and (solver.sigmas.diff() < 0).all()


def test_shift_divides_the_snr():
    plain, shifted = make_solver("unipc", 10, 1).sigmas[1:-1], make_solver("unipc", 10, 3).sigmas[1:-1]
    assert torch.allclose(snr(plain) / snr(shifted), torch.tensor(9.0), rtol=1e-4)   # 1e-4: float32 of 1 - sigma near sigma = 1
    assert snr(torch.tensor(0.5)) == 1 and snr(torch.tensor(1.0)) == 0


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_network_that_knows_the_picture_is_followed_to_it(name, steps):
    picture, x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3)
    end = run(make_solver(name, steps, 5), lambda x, sigma: (x - picture) / sigma, x)
    assert torch.allclose(end, picture, atol=1e-5)


@pytest.mark.parametrize("name, order", [("euler", 1), ("dpm++", 2), ("unipc", 3)])
def test_order_of_convergence(name, order):
    """dx/dsigma = x - 2 sigma, x = c exp(sigma) + 2 sigma + 2. Halving the steps, even in lambda, divides the error by 2^order."""
    errors = []
    for steps in (10, 20, 40):
        solver = make_solver(name, steps + 2, 1)
        lambdas = [-2 + 4 * i / steps for i in range(steps + 1)]     # away from its infinite ends
        solver.levels = [1 / (1 + math.exp(lam)) for lam in lambdas] + [0.01, 0.0]   # two unused levels: the last step is first order
        start, end = solver.levels[0], solver.levels[steps]
        exact = (1 - 2 * start - 2) * math.exp(end - start) + 2 * end + 2
        velocity = lambda x, sigma: x - 2 * sigma
        x = run(solver, velocity, torch.ones(1), steps)
        if name == "unipc":                                          # the corrected latents are those of full order
            solver.step(velocity(x, end), steps, x)
            x = solver.x
        errors.append(abs(x.item() - exact))
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(m - order) < 0.15 for m in measured), f"orders {measured}, errors {errors}"


def test_corrector_is_the_weighted_mean_of_a_parabola():
    solver = make_solver("unipc", 12, 3)
    h, q = solver.h(5), solver.h(4) / solver.h(5)
    parabola = lambda tau: 0.3 - 1.1 * tau + 0.7 * tau ** 2
    solver.x0_history = [torch.tensor(parabola(tau), dtype=torch.float64) for tau in (-q, 0.0, 1.0)]
    tau = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    weight = (h * tau).exp()
    mean = (weight * parabola(tau)).sum() / weight.sum()
    assert abs(solver.correct(5) - mean) < 1e-8


@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_a_solver_can_be_used_again(name):
    solver, x = make_solver(name, 6, 3), torch.ones(4)
    assert torch.equal(run(solver, lambda x, s: torch.sin(x), x), run(solver, lambda x, s: torch.sin(x), x))
    assert run(solver, lambda x, s: torch.sin(x), x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("args, words", [
    (("heun", 40, 3), "'heun': choose one of unipc, dpm++"), (("unipc", 0, 3), "from 1 to 1000, got 0"), (("euler", 2.5, 3), "got 2.5"),
    (("unipc", 40, 0), "positive number, got 0"), (("euler", 40, 1e9), "closer than float32")])
def test_solver_errors(args, words):
    with pytest.raises(ValueError) as error:
        make_solver(*args)
    assert words in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------------------- text

@pytest.mark.parametrize("raw, clean", [
    ("  a \t red\n\nface ", "a red face"),
    ("a\u3000b\u00a0c\u2028d", "a b c d"),                            # ideographic, no-break and line-separator spaces
    ("&lt;b&gt; &amp;amp; &amp;nbsp;x", "<b> & x"),
    ("a < b &amp;amp; c", "a < b & c"),                               # ftfy leaves entities alone beside a "<": hence unescaped twice
    ("schÃ¶n", "schön"),                                              # UTF-8 read as Latin-1
    ("“quoted”，ｆｕｌｌ", '"quoted",full'),                           # ftfy: plain quotes, half-width forms
    ("", ""), ("\udc80", "\ufffd")])
def test_clean_prompt(raw, clean):
    assert clean_prompt(raw) == clean


@pytest.fixture
def tokenizer_file(tmp_path):
    """A tokenizer.json like umT5's: characters, a template that adds </s>, and truncation and padding stored by mistake."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581"] + [chr(c) for c in range(97, 123)]
    model = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.add_special_tokens(pieces[:3])
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model.enable_truncation(5)
    model.enable_padding(length=20)
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizer(tokenizer_file, capsys):
    tokenizer = Tokenizer(tokenizer_file, length=8)
    assert tokenizer(" ab\n c").tolist() == [[3, 4, 5, 3, 6, 1]]      # no padding, one </s>
    assert tokenizer("").tolist() == [[1]]
    assert tokenizer("abcdef").tolist() == [[3, 4, 5, 6, 7, 8, 9, 1]] and capsys.readouterr().err == ""   # exactly full
    assert tokenizer("abcdefg").tolist() == [[3, 4, 5, 6, 7, 8, 9, 1]]
    assert "prompt has 9 tokens, the model reads 8" in capsys.readouterr().err
    long = Tokenizer(tokenizer_file)("x " * 400)
    assert long.shape == (1, 512) and long[0, -1] == 1 and (long == 1).sum() == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_tokenizer_errors(tmp_path, tokenizer_file):
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(ValueError, match="cannot read the tokenizer .*text.json"):
        Tokenizer(tmp_path / "text.json")
    with pytest.raises(ValueError, match="cannot read the tokenizer .*absent.json"):
        Tokenizer(tmp_path / "absent.json")
    for other, what in ((models.BPE(), "wanted a Unigram model"), (models.Unigram([("a", -1.0)], unk_id=0), "no </s> token")):
        tokenizers.Tokenizer(other).save(str(tmp_path / "other.json"))
        with pytest.raises(ValueError, match=what):
            Tokenizer(tmp_path / "other.json")
    with pytest.raises(ValueError, match="take both from one checkpoint"):
        encode_prompt(encoder(vocab=10), Tokenizer(tokenizer_file), "xyz")


def encoder(**changes):
    torch.manual_seed(0)
    model = TextEncoder(TextConfig(**{**dict(vocab=40, dim=24, dim_attn=32, ffn=40, n_head=4, n_layer=3), **changes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_buckets():
    """8 exact distances and 8 logarithmic ones on each side: edges at 16, 23, 32, 46, 64, 91; 128 and more share the last."""
    bucket = position_buckets(200, 32, 128)
    before = bucket[199].flip(0)                                      # keys 0, 1, 2, .. before the query
    assert before[:9].tolist() == list(range(9)) and before.max() == 15 and bucket[0, 1:].min() == 17
    edges = [d for d in range(1, 200) if before[d] != before[d - 1]]
    assert edges == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


@torch.no_grad()
def test_padding_changes_nothing(tokenizer_file):
    """The official code pads to 512 tokens and masks them."""
    model, tokenizer = encoder(), Tokenizer(tokenizer_file)
    ids = tokenizer("a face that speaks")                             # (1, S)
    S = ids.shape[1]
    rows = encode_prompt(model, tokenizer, "a face  that speaks ")
    padded, mask = torch.nn.functional.pad(ids, (0, 512 - S)), (torch.arange(512) < S)[None]
    assert rows.shape == (S, 24) and rows.dtype == torch.float32
    assert torch.allclose(model(padded, mask)[0, :S], rows, atol=1e-5)


@torch.no_grad()
def test_bfloat16_keeps_a_float32_residual_stream():
    model, ids, dtypes = encoder(), torch.randint(3, 30, (1, 9)), []
    reference = model(ids)
    model.blocks[1].register_forward_pre_hook(lambda block, args: dtypes.append(args[0].dtype))
    assert (model.bfloat16()(ids).float() - reference).norm() < 0.1 * reference.norm()
    assert dtypes == [torch.float32]
