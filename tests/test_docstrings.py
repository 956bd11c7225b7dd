"""The docstrings of the public names, as an editor shows them: complete, in one format, and consistent."""

import enum
import importlib
import inspect
import re
from collections import defaultdict

import pytest
from torch import nn

import fastntxent
from fastntxent import compat, error_budget, losses, modules


def forwards(names):
    """Return the `forward` of every module of this package among the names."""
    return {
        f"{name}.forward": cls.forward
        for name, cls in names.items()
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.forward.__module__.startswith("fastntxent.")
    }


PUBLIC = {name: getattr(fastntxent, name) for name in fastntxent.__all__}
METHODS = {
    **forwards(PUBLIC),
    "NegativeQueue.push": fastntxent.NegativeQueue.push,
    "NegativeQueue.neg_lse": fastntxent.NegativeQueue.neg_lse,
}
DOCUMENTED = {**PUBLIC, **METHODS, "error_budget.compare": error_budget.compare}
FUNCTIONS = {name: obj for name, obj in DOCUMENTED.items() if inspect.isfunction(obj)}
DROP_INS = {
    f"{library}.{name}": obj
    for library in compat.__all__
    for module in [importlib.import_module(f"fastntxent.compat.{library}")]
    for name, obj in [(name, getattr(module, name)) for name in module.__all__]
    if callable(obj) and not (inspect.isclass(obj) and issubclass(obj, enum.Enum))
}
LOSSES = sorted({*losses.__all__, *modules.__all__} - {"NTXentTerms", "NegativeQueue"})

# A parameter has the same description in every docstring, so rewording a single copy fails the test. Only these
# parameters have several descriptions, because their meaning differs or a function adds a sentence.
DESCRIPTIONS = {
    "backend": 3,  # for a loss, `verify` and `compare`
    "bias": 2,  # for a loss, and as the initial value in a module
    "ceiling": 2,  # `sup_con` has no margins
    "form": 2,  # for `sup_con`, and for several positives
    "group": 7,  # for a loss (three add a sentence), `nt_xent_terms`, `compare` and `Sharding`
    "ids": 8,  # for a loss (two add a sentence), SigLIP, the primitive, and three for a queue
    "in_batch_negatives": 2,  # True by default with a queue
    "loss": 3,  # for `warm_up`, `matryoshka` and its module
    "margin": 2,  # for a limit, and for a guide
    "negatives": 2,  # only `info_nce` takes a set for each query
    "normalize": 3,  # for a loss, with a teacher, and for a queue
    "options": 2,  # for `warm_up` and `matryoshka`
    "positives": 2,  # `info_nce` excludes more
    "reduction": 6,  # the mean is over 2N rows, V N rows, rows with a positive, queries, samples or images
    "teacher_temperature": 2,  # only the function takes a teacher_logit_scale
    "temperature": 10,  # for a loss (per row in three, optional in two, MACL's), a module (MACL's) and `compare`
    "u": 2,  # for the primitive, and for a queue
    "views": 2,  # for `multiview_nt_xent` and `cached_backward`
    "weights": 2,  # for pairs of towers, and for widths
    "z": 5,  # one for each shape
}


def is_named_tuple(obj):
    return inspect.isclass(obj) and issubclass(obj, tuple)


def signature(obj):
    """Return the names of the parameters. `*args` and `**kwargs` keep their stars."""
    found = inspect.signature(obj)
    stars: dict[int, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(p.kind, "") + name for name, p in found.parameters.items() if name != "self"]


def section(obj, *titles):
    """Return the lines of the docstring's section with one of these titles; [] if there is no such section."""
    lines = inspect.getdoc(obj).splitlines()
    begin = next((index for index, line in enumerate(lines) if line in {f"{title}:" for title in titles}), None)
    if begin is None:
        return []
    rest = lines[begin + 1 :]
    end = next((index for index, line in enumerate(rest) if line and not line.startswith(" ")), len(rest))
    return rest[:end]


def described(obj):
    """Return the description of each argument, or of each field of a named tuple, in the order of the docstring."""
    entries: dict[str, str] = {}
    name = ""
    for line in section(obj, "Args", "Attributes"):
        if line.startswith(" " * 8) or not line:
            entries[name] += " " + line.strip()
        else:
            match = re.fullmatch(r"    (\*{0,2}\w+): (\S.*)", line)
            assert match, f"expected an argument and its description, got {line!r}"
            name, text = match.groups()
            assert name not in entries, f"{name} is described twice"
            entries[name] = text
    return {name: " ".join(text.split()) for name, text in entries.items()}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_describes_the_parameters_of_the_signature_in_their_order(name):
    assert list(described(DOCUMENTED[name])) == signature(DOCUMENTED[name])


@pytest.mark.parametrize(("name", "obj"), (DROP_INS | forwards(DROP_INS)).items())
def test_docstring_of_a_drop_in_describes_the_parameters_of_the_signature_in_their_order(name, obj):
    parameters, arguments = signature(obj), list(described(obj))
    if parameters[-1] == "**kwargs":  # the docstring lists the names that the library accepts
        parameters[-1:] = arguments[len(parameters) - 1 :]
    assert arguments == parameters


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_begins_with_one_line(name):
    summary, *rest = inspect.getdoc(DOCUMENTED[name]).splitlines()
    assert summary.endswith(".")
    assert not rest or not rest[0]


@pytest.mark.parametrize(("name", "obj"), (PUBLIC | DROP_INS).items())
def test_docstring_has_an_example(name, obj):
    assert any(line.startswith("    >>> ") for line in section(obj, "Example"))


@pytest.mark.parametrize(("name", "obj"), (DOCUMENTED | DROP_INS | forwards(DROP_INS)).items())
def test_docstring_describes_arguments_without_referring_to_another_docstring(name, obj):
    for argument, text in described(obj).items():
        assert not re.match(r"(?i)(as|like) (in|of|for) `", text), f"{argument}: {text}"


@pytest.mark.parametrize("name", LOSSES)
def test_docstring_of_a_loss_has_its_formula_and_its_paper(name):
    doc = inspect.getdoc(PUBLIC[name])
    assert ".. math::" in doc
    assert re.search(r'", (19|20)\d\d\b', doc)


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - {"NegativeQueue.push"}))
def test_docstring_of_a_function_says_what_it_returns(name):
    returns = section(FUNCTIONS[name], "Returns")
    assert returns
    assert ": " not in returns[0]  # Sphinx would take text before a colon for the type


@pytest.mark.parametrize("name", [name for name, obj in PUBLIC.items() if not is_named_tuple(obj)])
def test_docstring_says_what_is_raised(name):
    raises = section(PUBLIC[name], "Raises")
    assert raises or not signature(PUBLIC[name])
    for line in filter(None, raises):
        assert line.startswith(" " * 8) or re.match(r"    \w+Error: \S", line), line


def test_docstrings_describe_a_shared_parameter_in_the_same_words():
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for name, obj in DOCUMENTED.items():
        if is_named_tuple(obj):
            continue
        for parameter, text in described(obj).items():
            texts[parameter.lstrip("*")].setdefault(text, name)
    different = {
        parameter: {name: text for text, name in by_text.items()}
        for parameter, by_text in texts.items()
        if len(by_text) != DESCRIPTIONS.get(parameter, 1)
    }
    assert not different
