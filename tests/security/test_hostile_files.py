"""Files made to hurt: each is refused in words, and nothing outside its folder is read, written or run."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent))
from readers import good_report

from secateurs.errors import DataError, PlanError, UserError
from secateurs.files import parse_form, plain_json, refuse_links, write_text
from secateurs.plan import DropBlock, Plan
from secateurs.report import Report
from secateurs.terminal import escape
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.bundle import write_bundle
from secateurs_adapters.data_settings import ImageFolderSettings, TsvSettings
from secateurs_adapters.datasets import load_image_folder, load_tsv
from secateurs_adapters.npz import read_arrays
from secateurs_adapters.report_html import render
from secateurs_adapters.zoo.results import Result


class Form(BaseModel):
    a: float


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 100_000, '{"a": 1', "\ud800"],
)
def test_json_that_means_two_things_or_has_no_end_is_refused(text):
    with pytest.raises(UserError):
        plain_json(text.encode("utf-8", "surrogatepass"), "it")
    with pytest.raises(UserError):
        parse_form(text.encode("utf-8", "surrogatepass"), Form, "it")


@pytest.mark.parametrize(
    ("number", "fits"), [(2**64 - 1, True), (-(2**63), True), (2**64, False), (-(2**63) - 1, False)]
)
def test_integers_have_64_bits(number, fits):
    if fits:
        assert plain_json(f"[{number}]", "it") == [number]
    else:
        with pytest.raises(UserError, match="more than 64 bits"):
            plain_json(f"[{number}]", "it")


def test_a_report_of_which_parts_are_missing_is_drawn():
    document = json.loads(good_report().to_json())
    del document["candidate"]
    report = Report.model_validate(document)
    assert report.ratios.params is not None
    assert "</html>" in render(report)


def test_a_plan_with_a_key_twice_or_a_huge_tuple_is_refused():
    with pytest.raises(PlanError, match="twice"):
        Plan.from_json('{"schema_version": 1, "edits": [], "edits": []}')
    with pytest.raises(PlanError, match="elements"):
        Plan.from_json('{"edits": [{"edit": "drop_block", "path": "a", "elements": 1000000000000}]}')
    assert Plan.from_json(Plan(edits=(DropBlock(path="a", elements=2),)).to_json()).edits[0].elements == 2


def test_control_characters_and_markup_do_nothing_in_a_terminal():
    shown = escape("conv\x1b[2J[red]\x07\u202eabc\x9b")
    assert shown.replace("\\[", "[") == "conv\\x1b[2J[red]\\x07\\u202eabc\\x9b"
    assert all(char.isprintable() for char in shown)


def test_names_in_a_page_are_text():
    report = good_report()
    report.passes[0].name = "<script>alert(1)</script>"
    report.reasons.append("'\"><img src=x onerror=alert(1)>")
    page = render(report, "<script>alert(2)</script>")
    assert "<script>" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    "folder", ["javascript:alert(1)//", "../../x", "/etc", "C:\\x", "\\\\host\\share", "a/../../b"]
)
def test_a_zoo_result_names_only_what_lies_below(folder):
    with pytest.raises(ValueError, match="out of the folder"):
        Result(name="a", key="k", status="pass", timeout=1.0, recipe="r", folder=folder, log="l")


# --- links --------------------------------------------------------------------------------------------------------------------------------


def test_links_in_an_output_folder_are_refused_on_every_level(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    (out / "a" / "b").mkdir(parents=True)
    other.mkdir()
    refuse_links(out)
    refuse_links(tmp_path / "none")
    (out / "a" / "b" / "c").symlink_to(other)
    with pytest.raises(UserError, match="symbolic link 'a/b/c'"):
        refuse_links(out)


def test_a_link_under_a_final_name_is_replaced_and_not_followed(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "report.json"
    victim.write_text("mine")
    link.symlink_to(victim)
    write_text(link, "new")
    assert victim.read_text() == "mine"
    assert not link.is_symlink()
    assert link.read_text() == "new"


def test_reports_that_are_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(UserError, match="no plain file"):
        Report.load(tmp_path / "report.json")


# --- arrays, tables and images ------------------------------------------------------------------------------------------------------------


def _npy(shape: str, descr: str = "'|u1'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_second_member_does_not_get_past_the_limit(tmp_path):
    """`numpy.load` prefers the member `x` to `x.npy`; the limit was held against the other."""
    file = io.BytesIO()
    np.save(file, np.arange(3))
    path = _zip(tmp_path / "a.npz", {"x.npy": file.getvalue(), "x": _npy("(1000000000000000,)")})
    assert read_arrays(path, ["x"], 100)["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "content",
    [
        _npy("(1000000000000,)"),
        _npy("(4,)", "'|O'"),
        _npy("(" * 300),
        _npy("(" + "-" * 5000 + "1,)"),
        _npy("(True, True)"),
        b"\x93NUMPY\x09\x00",
        b"",
    ],
    ids=["bomb", "objects", "nested", "signs", "truth", "version", "nothing"],
)
def test_arrays_that_lie_about_themselves_are_refused(tmp_path, content):
    with pytest.raises(DataError):
        read_arrays(_zip(tmp_path / "a.npz", {"x.npy": content}), ["x"], 2**20)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = _zip(tmp_path / "a.npz", {"x.npy": _npy("(100000000,)") + bytes(10**8)})
    assert path.stat().st_size < 2**20
    with pytest.raises(DataError, match="max_bytes"):
        read_arrays(path, None, 2**20)


def test_a_table_larger_than_its_limit_is_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("text\t1\n" * 100)
    with pytest.raises(DataError, match="at most 50 are read"):
        load_tsv(TsvSettings(file=tmp_path / "a.tsv", tokenizer="none", max_bytes=50))
    (tmp_path / "a.tsv").write_text("text\t99999999999999999999999\n")
    with pytest.raises(DataError, match="is not an integer"):
        load_tsv(TsvSettings(file=tmp_path / "a.tsv", tokenizer="none"))


def test_a_picture_in_name_only_reaches_no_other_program(tmp_path):
    """EPS is drawn by ghostscript; a name that ends in .png must not lead there."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(DataError, match="UnidentifiedImageError"):
        load_image_folder(ImageFolderSettings(folder=tmp_path, size=(4, 4)))


# --- ONNX ---------------------------------------------------------------------------------------------------------------------------------


def _network(path: Path, location: str) -> Path:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0] * 4)
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [tensor])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../secret",
        "sub/../../secret",
        "../home/w.data",
        "..\\secret",
        "C:\\x",
        "C:x",
        "\\\\host\\x",
        "a\0b",
        "",
        "link",
    ],
)
def test_external_data_lies_below_the_file(tmp_path, location):
    home = tmp_path / "home"
    home.mkdir()
    (home / "w.data").write_bytes(bytes(16))
    (tmp_path / "secret").write_bytes(bytes(16))
    (home / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="outside its own folder"):
        read_artifact(_network(home / "m.onnx", location))


@pytest.mark.parametrize(
    "name", ["numpy.py", "json.PY", "onnxruntime.so", "measure.py", "manifest.json", "base.onnx", "README.txt"]
)
def test_a_bundle_holds_no_code_of_the_network(tmp_path, name):
    """The device runs `python measure.py` in that folder, which would import `numpy.py` from beside it."""
    (tmp_path / name).write_bytes(bytes(16))
    file = read_artifact(_network(tmp_path / "m.onnx", name))
    with pytest.raises(DataError, match="cannot hold"):
        write_bundle(file, file, tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_a_name_in_the_model_card_is_text():
    from secateurs.card import _plain

    told = _plain("layer<img src=x>\n# [a](b) `c` | \x1b[2J accuracy_drop")
    assert told == r"layer\<img src=x\> \# \[a\](b) \`c\` \| \\x1b\[2J accuracy_drop"
