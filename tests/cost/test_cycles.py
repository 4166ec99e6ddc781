"""Where a TPU's time goes, read from the text of a program with figures that are added by hand."""

import pytest

from tpgrpo_jax.cost import cycles, hardware

CHIP = hardware.Chip(1, flops=1e6, hbm_bandwidth=1, link_bandwidth=1e3, clock=100.0)
COST = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'
OPERANDS = (
  "operand_layout_constraints={s8[1,1,1]{2,1,0}, f32[1,2,8,4]{3,2,1,0}, f32[1,2,16,4]{3,2,1,0}, "
  "f32[1,2,16,4]{3,2,1,0}}"
)
TEXT = f"""HloModule jit_f

FileNames
1 "/somewhere/numpy.py"
2 "/home/a/tpgrpo_jax/models/layers.py"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=1}}
2 {{file_name_id=2 function_name_id=2 line=88 end_line=88 column=1 end_column=1}}

StackFrames
1 {{file_location_id=2 parent_frame_id=1}}
2 {{file_location_id=1 parent_frame_id=2}}

%product (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %c = f32[4]{{0}} convolution(%p, %p), dim_labels=bf_io->bf
}}

%moved (p: f32[4]) -> f32[2,2] {{
  %p = f32[4]{{0}} parameter(0)
  %r = f32[2,2]{{1,0}} bitcast(%p)
  ROOT %t = f32[2,2]{{0,1}} transpose(%r), dimensions={{1,0}}
}}

%sum (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %a = f32[4]{{0}} add(%p, %p)
}}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %fusion.1 = f32[4]{{0}} fusion(%s), kind=kOutput, calls=%product, {COST.format(200)}
  %fusion.2 = f32[2,2]{{0,1}} fusion(%f), calls=%moved, metadata={{stack_frame_id=2}}, {COST.format(50)}
}}

%condition (s: (s32[], f32[4])) -> pred[] {{
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%dear (p: f32[4]) -> f32[4] {{
  ROOT %fusion.3 = f32[4]{{0}} fusion(%p), kind=kLoop, calls=%sum, {COST.format(400)}
}}

%cheap (p: f32[4]) -> f32[4] {{
  ROOT %fusion.4 = f32[4]{{0}} fusion(%p), kind=kLoop, calls=%sum, {COST.format(10)}
}}

ENTRY %main (p: f32[4]) -> f32[4] {{
  %w = (s32[], f32[4]{{0}}) while(%p), condition=%condition, body=%body
  %x = f32[4]{{0}} conditional(%p, %w, %w), branch_computations={{%dear, %cheap}}
  %copy.1 = f32[4,1]{{1,0}} copy(%x), {COST.format(100)}
  %kernel = f32[1,2,8,4]{{3,2,1,0}} custom-call(%x), {OPERANDS}, frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{}}"
}}}}, metadata={{op_name="a/splash_mha_fwd/pallas_call"}}
  ROOT %all-reduce.1 = f32[100]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%sum
}}
"""


def test_cycles_are_summed_by_kind_and_loops_as_often_as_they_turn():
  found = cycles.read_schedule(TEXT, CHIP, devices=2)
  assert found is not None
  assert found.seconds == pytest.approx({
    "matmul": 3 * 2.0,
    "copies": 3 * 0.5 + 1.0,
    "other": 4.0,  # the dearer branch
    "attention": 2 * 2 * (1 * 2 * 8 * 4) * 16 / 1e6,  # two products of queries and keys
    "collectives": 2 * 400 * 0.5 / 1e3,
  })  # fmt: skip


def test_the_dearest_copies_come_first_with_the_line_of_the_package_that_asked():
  found = cycles.read_schedule(TEXT, CHIP, devices=2)
  assert found is not None
  assert found.copies == (
    cycles.Copy(1.5, 3, "f32[2,2]", "models/layers.py:88"),
    cycles.Copy(1.0, 1, "f32[4,1]", ""),
  )
  head, *rows = cycles.render(found)
  assert "matmul 46.5%" in head and "models/layers.py:88" in rows[0] and "the compiler" in rows[1]


def test_a_program_of_another_compiler_has_no_schedule():
  plain = TEXT.replace("estimated_cycles", "cost")
  assert cycles.read_schedule(plain, CHIP, devices=2) is None
  assert cycles.read_schedule(TEXT, hardware.CHIPS["h100"], devices=2) is None
