"""What the size of the code and the reach of a call are counted from."""

import pathlib
import runpy
import threading

from benchmarks.house import Size, count_entered, enter_call, measure_room

SOURCE = """
import threading

class Class:
    def method(self):
        return [helper(x) for x in range(2)]

def helper(x):
    return (lambda: x)()

def never():
    def inner():
        pass

def start():
    thread = threading.Thread(target=Class().method)
    thread.start()
    thread.join()
"""


def test_a_room_is_counted_with_the_folders_inside_it(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/source.py").write_text(SOURCE)
    (tmp_path / "empty.py").touch()
    (tmp_path / "README.md").write_text("def not_code(): ...")
    assert measure_room(tmp_path) == Size(files=2, lines=18, functions=5)
    assert measure_room(tmp_path / "missing") == Size(0, 0, 0)


def test_functions_that_a_call_enters_are_counted_once_each_and_in_threads_too(tmp_path):
    (tmp_path / "source.py").write_text(SOURCE)
    names = runpy.run_path(str(tmp_path / "source.py"))
    method = names["Class"]().method
    assert count_entered(method, tmp_path) == (1, 3)  # method, helper, the lambda
    assert count_entered(names["start"], tmp_path) == (1, 4)
    assert count_entered(method, tmp_path / "elsewhere") == (0, 0)
    # Nothing is counted any more.
    assert threading.getprofile() is None


def test_a_second_call_enters_no_more_than_the_first():
    files, functions, files_again, functions_again = enter_call("weight_matching")
    room = measure_room(pathlib.Path(__file__).parents[2] / "rebasin")
    assert 0 < files_again <= files <= room.files
    assert 0 < functions_again <= functions <= room.functions
