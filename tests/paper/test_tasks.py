"""The VTAB-1k tasks: the paper's list, and folders that are or are not what they should be."""

from __future__ import annotations

import dataclasses

import pytest
from vtab_folders import write_task

from hgprompt.errors import DataError
from hgprompt.paper import VTAB, check_task, find_suite, tasks


@pytest.fixture
def small_vtab(monkeypatch):
    """VTAB as it is, with sizes that a test can write."""
    monkeypatch.setattr(tasks, "_SIZES", {"train800": 6, "val200": 3, "train800val200": 9})
    small = {t.name: dataclasses.replace(t, classes=3, test=4) for t in VTAB}
    monkeypatch.setattr(tasks, "_BY_NAME", small)


def test_the_list_is_vtabs_and_the_papers():
    assert len(VTAB) == 19
    assert len({t.name for t in VTAB}) == 19
    # Table 1's header, with SVHN where it prints NHAS.
    columns = "CIFAR-100 DTD Flowers102 Pets SVHN EuroSAT DMLab sNORB-Azim sNORB-Elev dSpr-Loc dSpr-Ori Clevr-Count"
    assert [t.title for t in VTAB if t.in_paper] == [*columns.split(), "Clevr-Dist"]
    # Zhai et al. 2019: 7 natural, 4 specialized, 8 structured tasks.
    groups = [t.group for t in VTAB]
    assert [groups.count(g) for g in ("natural", "specialized", "structured")] == [7, 4, 8]


@pytest.mark.parametrize("apart", [False, True])
def test_a_task_of_ones_own_keeps_its_counts(tmp_path, apart):
    task = check_task(write_task(tmp_path / "mushrooms", sizes=(7, 2, 5), apart=apart))
    assert (task.group, task.num_classes) == ("own", 3)
    loaded = task.load((16, 16), "bicubic", test_limit=3)
    sizes = [len(s) for s in (loaded.train800, loaded.val200, loaded.train800val200, loaded.test)]
    assert sizes == [7, 2, 9, 3]
    # val200 has the classes 0 and 1 alone: the task's number of classes holds for all splits.
    assert {s.num_classes for s in (loaded.train800, loaded.val200, loaded.test)} == {3}


def test_vtab_tasks_are_held_to_vtabs_counts(tmp_path, small_vtab):
    assert check_task(write_task(tmp_path / "svhn")).group == "natural"
    write_task(tmp_path / "dtd", sizes=(5, 3, 9))
    with pytest.raises(DataError, match=r"train800.txt has 5 images, VTAB-1k has 6.*test.txt has 9 images.* has 4"):
        check_task(tmp_path / "dtd")
    write_task(tmp_path / "eurosat", classes=4)
    with pytest.raises(DataError, match=r"train800.txt has label 3, the task has 3 classes"):
        check_task(tmp_path / "eurosat")


def test_the_real_counts_are_not_taken_lightly(tmp_path):
    with pytest.raises(DataError, match=r"train800.txt has 6 images, VTAB-1k has 800"):
        check_task(write_task(tmp_path / "kitti"))


def test_splits_must_fit_together(tmp_path):
    folder = write_task(tmp_path / "a")
    lines = (folder / "train800val200.txt").read_text().splitlines()
    (folder / "train800val200.txt").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(DataError, match=r"not train800.txt and val200.txt together"):
        check_task(folder)
    folder = write_task(tmp_path / "b")
    (folder / "test.txt").write_text((folder / "val200.txt").read_text())
    with pytest.raises(DataError, match=r"3 images are in both train800val200.txt and test.txt"):
        check_task(folder)
    (folder / "val200.txt").unlink()
    with pytest.raises(DataError, match=r"lacks val200.txt"):
        check_task(folder)


def test_copies_in_a_folder_of_their_own_must_have_the_same_labels(tmp_path):
    folder = write_task(tmp_path / "a", apart=True)
    lines = (folder / "train800val200.txt").read_text().splitlines()
    (folder / "train800val200.txt").write_text("\n".join([*lines[:-1], lines[-1][:-1] + "0"]) + "\n")
    with pytest.raises(DataError, match=r"not train800.txt and val200.txt together"):
        check_task(folder)


def test_missing_tasks_are_named_and_aliases_found(tmp_path, small_vtab):
    write_task(tmp_path / "cifar100")
    write_task(tmp_path / "oxford_pet")
    write_task(tmp_path / "kitti")
    write_task(tmp_path / "zebras")
    suite = find_suite(tmp_path)
    assert list(suite.tasks) == ["cifar", "oxford_iiit_pet", "zebras"]  # kitti is none of the paper's
    assert len(suite.missing) == 11
    assert "svhn" in suite.missing
    assert suite.lines()[0].startswith("skipped, not in")
    assert "svhn" in suite.lines()[0]
    assert list(find_suite(tmp_path, ["kitti", "cifar100"]).tasks) == ["cifar", "kitti"]
    everything = find_suite(tmp_path, ["all"])
    assert list(everything.tasks) == ["cifar", "oxford_iiit_pet", "kitti", "zebras"]
    assert everything.named(["own", "cifar100"]) == ("cifar", "zebras")
    assert everything.named(["paper"]) == ("cifar", "oxford_iiit_pet")
    with pytest.raises(DataError, match=r"none of the tasks svhn: .*it has cifar"):
        everything.named(["svhn"])
    with pytest.raises(DataError, match=r"no task 'zebra'.*zebras"):
        find_suite(tmp_path, ["zebra"])
    with pytest.raises(DataError, match="holds none of the tasks svhn"):
        find_suite(tmp_path, ["svhn"])


def test_absent_classes_are_said(tmp_path, small_vtab):
    write_task(tmp_path / "svhn", classes=2)
    assert find_suite(tmp_path, ["svhn"]).lines() == ["svhn: 1 of 3 classes have no training image"]


def test_the_digest_is_of_the_data_and_not_of_the_place(tmp_path):
    one = check_task(write_task(tmp_path / "x" / "mice"))
    same = check_task(write_task(tmp_path / "y" / "mice"))
    assert one.digest == same.digest
    folder = write_task(tmp_path / "z" / "mice")
    (folder / "test.txt").write_text((folder / "test.txt").read_text().replace("000000.png 0", "000000.png 1"))
    assert check_task(folder).digest != one.digest
