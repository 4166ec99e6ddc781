"""Names of plug-ins: found, imported, or refused with the nearest one."""

import collections

import pytest

from tpgrpo_jax import registry

TABLE = {"flow_grpo": 1, "tp_grpo": 2, "increments": 3}


def lookup(name):
  return registry.lookup(TABLE, name, field="credit.method")


def test_a_known_name_is_looked_up():
  assert lookup("tp_grpo") == 2


def test_an_importable_path_is_imported():
  assert lookup("collections:OrderedDict") is collections.OrderedDict


def test_a_known_name_is_preferred_to_an_import():
  assert registry.lookup({"collections:OrderedDict": 7}, "collections:OrderedDict", field="f") == 7


def test_an_unknown_name_is_refused_with_field_nearest_and_choices():
  message = (
    r"^credit\.method='increment': unknown name\. Did you mean 'increments'\? "
    r"Choices: flow_grpo, increments, tp_grpo\..*package\.module:function"
  )
  with pytest.raises(ValueError, match=message):
    lookup("increment")


def test_a_name_like_no_other_gets_no_guess():
  with pytest.raises(ValueError) as error:
    lookup("zzz")
  assert "Did you mean" not in str(error.value) and "Choices: flow_grpo" in str(error.value)


@pytest.mark.parametrize(
  "name, cause",
  [("no_such_package:f", "No module named"), ("collections:no_such_function", "no_such_function")],
)
def test_a_failed_import_is_refused_with_its_cause(name, cause):
  with pytest.raises(
    ValueError, match=f"credit.method='{name}': cannot import.*{cause}.*PYTHONPATH"
  ):
    lookup(name)


def test_check_accepts_a_path_only_where_one_may_be_given():
  registry.check("a.b:c", TABLE, field="f", importable=True)
  with pytest.raises(ValueError, match="f='a.b:c': unknown name"):
    registry.check("a.b:c", TABLE, field="f")
