"""The figures of LeRobot's policies, in README.md and docs/, are the committed ones."""

from __future__ import annotations

import json

import numpy as np
from pages import ROOT, numbers, read, results, rows, said, same


def test_lerobots_unet_beside_its_peers() -> None:
    document = results(read("lerobot.md"), "unet")
    cases = document["cases"]
    found = rows(read("lerobot.md"), "ms for one forward pass")
    names = ["eager", "compile", "onnxruntime", "openvino"]
    names += ["tsad float32", "tsad int16", "tsad int8"]
    assert list(cases[0]["contenders"]) == names and len(found) == len(names) + 1
    for name, row in zip(names, found, strict=False):
        for written, case in zip(row[1:], cases, strict=True):
            same(written, case["contenders"][name]["ms"]["median"])
    for written, case in zip(found[-1][1:], cases, strict=True):
        same(written, case["contenders"]["eager"]["floor_ms"])

    def away(ending: str) -> float:
        """The largest error of those contenders, in shares of the largest output."""
        return max(
            one["error"] / (case["largest_output"] if ending != "32" else 1)
            for case in cases
            for name, one in case["contenders"].items()
            if name.endswith(ending) or (ending == "32" and "tsad" not in name)
        )

    said(
        "lerobot.md",
        r"within (\S+) of float64; 16 bits are away by up to (\S+) % .* 8 bits by (\S+) %",
        away("32"),
        100 * away("int16"),
        100 * away("int8"),
    )
    said("lerobot.md", r"\((\d+) million parameters\)", cases[0]["parameters"] / 1e6)
    medians = [cases[0]["contenders"][name]["ms"]["median"] for name in ("tsad float32", *names)]
    said(
        "README.md",
        r"takes (\S+) ms \(PyTorch (\d+), ONNX Runtime (\S+)\), a",
        medians[0],
        medians[1],
        medians[3],
    )


def test_images_beside_their_peers() -> None:
    cases = results(read("lerobot.md"), "vision")["cases"]
    found = rows(read("lerobot.md"), "ms for the images of one moment")
    assert len(found) == len(cases[0]["contenders"]) + 2
    for name, row in zip(cases[0]["contenders"], found, strict=False):
        for written, case in zip(row[1:], cases, strict=True):
            same(written, case["contenders"][name]["ms"]["median"])
    for row, key in zip(found[-2:], ("floor", "floor_int16"), strict=True):
        for written, case in zip(row[1:], cases, strict=True):
            same(written, case[key]["ms"])
    medians = {
        name: [case["contenders"][name]["ms"]["median"] for case in cases]
        for name in cases[0]["contenders"]
    }
    theirs = [values for name, values in medians.items() if "tsad" not in name]
    peers = [min(all_) for all_ in zip(*theirs, strict=True)]
    times = [
        edge([peer / own for peer, own in zip(peers, medians[f"tsad {name}"], strict=True)])
        for name in ("float32", "int16", "int8")
        for edge in (min, max)
    ]
    assert min(times) > 1  # fastest in every column
    said(
        "lerobot.md",
        r"In float32 it is (\S+) to (\S+) times faster than the fastest of the others, in 16 bits "
        r"it is (\S+) to (\S+) times faster, with weights of 8 bits (\S+) to (\S+)\. This",
        *times,
    )
    gains = [a / b for a, b in zip(medians["tsad int16"], medians["tsad int8"], strict=True)]
    integers = [case["floor"]["compute_ms"] / case["floor_int16"]["compute_ms"] for case in cases]
    said(
        "lerobot.md",
        r"multiplies (\S+) times as many 16-bit",
        np.mean(integers),
    )
    said(
        "lerobot.md",
        r"they gain (\S+) to (\S+) times with small images and (\S+) to (\S+) with large ones",
        *(edge(some) for some in (gains[:4], gains[4:]) for edge in (min, max)),
    )

    def away(name: str) -> float:
        """The largest error, in percent of the largest feature."""
        return max(
            100 * case["contenders"][name]["error"] / case["largest_feature"] for case in cases
        )

    floats = [n for n in medians if n not in ("tsad int16", "tsad int8")]
    said(
        "lerobot.md",
        r"is within (\S+) of float64, 16 bits within (\S+) % of the largest feature, weights of "
        r"8 bits within (\S+) %",
        *(max(case["contenders"][n]["error"] for case in cases for n in floats),),
        *(away("tsad int16"), away("tsad int8")),
    )
    shares = [
        edge([100 * case["contenders"][f"tsad {name}"]["of_floor"] for case in cases])
        for name in ("float32", "int16")
        for edge in (min, max)
    ]
    said(
        "lerobot.md",
        r"reaches (\d+) to (\d+) % of that in its fastest round, in 16 bits (\d+) to (\d+) %",
        *shares,
    )
    sizes = [
        case[key][what] / 1e6
        for key, what in (
            ("bytes", "weights"), ("bytes_int16", "weights"), ("bytes_int8", "weights"),
            ("bytes", "rest"), ("bytes_int16", "rest"),
        )
        for case in (cases[0], cases[-1])
    ]  # fmt: skip
    said(
        "lerobot.md",
        r"keeps (\d+) to (\d+) MB of weights, in 16 bits (\d+) to (\d+), in 8 bits (\d+) to (\d+), "
        r"and (\d+) to (\d+) MB, or (\d+) to (\d+), to work in",
        *sizes,
    )
    one = next(i for i, c in enumerate(cases) if c["size"] == [96, 96] and c["images"] == 1)
    said(
        "README.md",
        r"a 96 x 96 image (\S+) ms \((\S+), (\S+)\)\.",
        *(medians[name][one] for name in ("tsad float32", "eager", "onnxruntime")),
    )


def test_memory_beside_peers() -> None:
    page = read("lerobot.md")
    cases = results(page, "memory")["cases"]
    first, *found = rows(page, "MB held once it runs")
    for written, case in zip(first[1:], cases.values(), strict=True):
        same(written, case["weight_bytes"] / 1e6)
    contenders = list(cases["unet-large"]["contenders"])
    assert len(contenders) == 7  # four peers, three precisions
    for name, row in zip(contenders, found, strict=True):
        for written, case in zip(row[1:], cases.values(), strict=True):
            same(written, case["contenders"][name]["bytes"] / 1e6)


def test_whole_chunks_of_lerobots_networks() -> None:
    page = read("lerobot.md")
    settings = json.loads((ROOT / "bench" / "frontier" / "few_passes.json").read_text())
    document = results(page, "large")
    found = rows(page, "chunk of (512, 1024, 2048)")
    for row, result, setting in zip(found, document["results"], settings, strict=True):
        assert result["name"] == setting["name"]
        assert f"num_inference_steps={setting['steps']}" in row[0] or "the same" in row[0]
        calls = result["call_ms"]
        facts = (result["passes"], calls["p50"], calls["p90"], result["chunks_per_second"])
        for written, value in zip(row[1:], facts, strict=True):
            same(written, value)
    (case,) = results(page, "dit")["cases"]
    names = ("tsad float32", "eager", "compile", "onnxruntime", "openvino", "tsad int16")
    medians = [case["contenders"][name]["ms"]["median"] for name in names]
    said(
        "lerobot.md",
        r"takes\s+(\S+) ms a pass in a chunk of ten, in PyTorch (\S+), compiled (\S+), "
        r"in ONNX Runtime (\S+) and in OpenVINO (\S+); in 16 bits (\S+)",
        *medians,
    )
    said("lerobot.md", r"own size \((\d+) million parameters, horizon", case["parameters"] / 1e6)
    pixels = results(page, "pixels")["results"]
    times = [r["call_ms"][q] for r in pixels for q in ("p50", "p90", "p99")]
    eyes = [r["stages_ms"]["vision"]["p50"] for r in pixels[1:]]
    said(
        "lerobot.md",
        r"takes (\S+) ms with ten steps of DDIM\s+\(p90 (\S+), p99 (\S+)\) and (\S+) ms with four "
        r"steps from the chunk before in 8 bits \((\S+), (\S+)\), (\S+) of them for the images; "
        r"with the\s+encoder in 16 bits (\S+) ms \((\S+), (\S+)\), (\S+) for the images",
        *times[:6], eyes[0], *times[6:], eyes[1],
    )  # fmt: skip
    said(
        "README.md",
        r'"pusht_pixels", preset="fast"\)` takes (\S+) ms from a 96 x 96 image',
        times[6],
    )


def test_the_policy_that_sees() -> None:
    page, card = read("images.md"), (ROOT / "tsad/assets/pusht_pixels/README.md").read_text()
    document = results(page, "vision-500")
    found = rows(page, "`pusht_pixels`, 500 episodes")
    assert rows(card, "`pusht_pixels`, 500 episodes") == found
    for row, result in zip(found, document["rows"].values(), strict=True):
        facts = (result["passes"], result["score"]["mean"], result["success"]["mean"])
        for written, value in zip(row[1:], facts, strict=True):
            same(written, value)
    fast = "ddim-8-int8-warm-4-vision-int16"
    presets = json.loads((ROOT / "tsad/assets/pusht_pixels/presets.json").read_text())["presets"]
    assert [preset["measured"]["setting"] for preset in presets] == [fast]
    score, success = (document[k]["rows"][fast] for k in ("compared", "compared_success"))
    said(
        "images.md",
        r"`fast` is (\S+) \((\S+) to (\S+)\) in score and (\S+) \((\S+) to (\S+)\) in\s+success",
        score["mean_difference"], *score["simultaneous"],
        success["mean_difference"], *success["simultaneous"],
    )  # fmt: skip
    document = results(page, "ddpm100-500")
    dense, pair = document["rows"]["ddpm-100"], document["pairs"][f"{fast} to ddpm-100"]
    said(
        "images.md",
        r"it has (\S+) over these seeds, success (\S+): `fast`, .* is (\S+) \((\S+) to (\S+)\) to "
        r"that in score and (\S+)\s+\((\S+) to (\S+)\) in success",
        dense["score"]["mean"], dense["success"]["mean"],
        pair["score"]["mean_difference"], *pair["score"]["interval95"],
        pair["success"]["mean_difference"], *pair["success"]["interval95"],
    )  # fmt: skip


def test_images_disturbed_and_encoders_in_16_bits() -> None:
    page = read("images.md")
    kinds = [results(page, f"{kind}-100") for kind in ("pixels-disturbed", "pixels-together")]
    compared = kinds[0]["compared"]["rows"]
    for row, name in zip(rows(page, "images | score"), kinds[0]["rows"], strict=True):
        means = [kind["rows"][name][of]["mean"] for kind in kinds for of in ("score", "success")]
        for written, value in zip((*row[1:3], *row[4:6]), means, strict=True):
            same(written, value)
        if name in compared:
            low, high = compared[name]["simultaneous"]
            known = (compared[name]["mean_difference"], low, high)
            for written, value in zip(numbers(row[3]), known, strict=True):
                same(written, value)
    played = list(results(page, "vision-500")["rows"].values())[1:]
    said(
        "images.md",
        r"score (\S+) with float32 encoders, (\S+) with 16 bits and (\S+) with weights of 8; "
        r"success (\S+),\s+(\S+) and (\S+)\. Beside",
        *(row[of]["mean"] for of in ("score", "success") for row in played),
    )
    pairs = results(page, "vision-500")["pairs"]
    found = [pairs[f"ddim-8-int8-warm-4-vision-{kind} to ddim-8-int8-warm-4"]["score"]
             for kind in ("int16", "int8")]  # fmt: skip
    said(
        "images.md",
        r"16 bits are (\S+) \((\S+) to (\S+)\) in score, "
        r"weights of 8 (\S+) \((\S+) to (\S+)\), each",
        *(number for pair in found for number in (pair["mean_difference"], *pair["interval95"])),
    )


def test_the_policy_of_lerobot_that_comes_along() -> None:
    document = results(read("lerobot.md"), "corners-500")
    settings = json.loads((ROOT / "bench" / "frontier" / "pusht_corners.json").read_text())
    compared = document["compared"]["rows"]
    found = rows(read("lerobot.md"), "`pusht_corners`, 500 episodes")
    card = (ROOT / "tsad" / "assets" / "pusht_corners" / "README.md").read_text()
    assert rows(card, "`pusht_corners`, 500 episodes") == found
    assert [setting["name"] for setting in settings] == list(document["rows"])
    for row, setting in zip(found, settings, strict=True):
        name = setting["name"]
        same(row[1], document["rows"][name]["passes"])
        for written, key in zip(row[2:4], ("score", "success"), strict=True):
            same(written, document["rows"][name][key]["mean"])
        if name in compared:
            mean, (low, high) = (compared[name][k] for k in ("mean_difference", "simultaneous"))
            for written, value in zip(numbers(row[4]), (-mean, -high, -low), strict=True):
                same(written, value)
    presets = json.loads((ROOT / "tsad/assets/pusht_corners/presets.json").read_text())["presets"]
    for preset in presets:
        (row,) = (row for row in found if f'preset="{preset["name"]}"' in row[0])
        same(row[2], preset["measured"]["score"]["mean"])
    fast, lossless = (preset["measured"]["milliseconds"] for preset in presets)
    said("lerobot.md", r"as trained, (\S+) with `lossless` and (\S+) with `fast`", lossless, fast)
    lerobots = results(read("lerobot.md"), "lerobot-eval")
    played, turns = lerobots["overall"], lerobots["in_turns"]["eval_s"]
    means = [sum(turns[mode]) / len(turns[mode]) for mode in ("exact", "off")]
    said("lerobot.md", r"take it (\S+) s of\s+evaluation.* and (\S+) s without", *means)
    assert played["n_episodes"] == 50
    wanted = (played["avg_max_reward"], played["pc_success"])
    said("lerobot.md", r"had a score of (\S+) and (\S+) % success", *wanted)
