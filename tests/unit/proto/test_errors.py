import inspect

from everstep.proto import errors


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    drawn: dict[str, str] = {}
    parents = ["EverstepError"]
    for line in (errors.__doc__ or "").splitlines():
        stem, found, rest = line.partition("── ")
        if found:
            depth = (len(stem) - 4) // 4 + 1
            name = rest.split()[0]
            parents[depth:] = [name]
            drawn[name] = parents[depth - 1]
    assert drawn == {
        name: kind.__base__.__name__ for name, kind in classes.items() if name != "EverstepError"
    }


def test_long_lists_are_cut_in_messages() -> None:
    names = tuple(f"leaf{index}" for index in range(50))
    message = str(errors.StateMismatch("differs", missing=names))
    assert "leaf19" in message
    assert "leaf20" not in message
    assert "and 30 more" in message
    assert "..." in str(errors.ShardCorrupt("here", tuple(range(9))))
