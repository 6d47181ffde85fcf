"""All names that AutoClip needs and TensorFlow and Keras do not export.

If a new version of either breaks something, look here first.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import numpy.typing as npt
import tensorflow as tf
from keras.src.saving import saving_lib
from keras.src.saving.keras_saveable import KerasSaveable
from tensorflow.python.framework.op_callbacks import should_invoke_op_callbacks
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.ops.resource_variable_ops import ResourceVariable
from tensorflow.python.saved_model.save_context import in_save_context

# The base classes of objects that Keras saves, and TensorFlow's checkpoints. Neither of the two
# tracks attributes: the clipper's variables belong to no one else's `variables`.
Trackable: Any = tf.__internal__.tracking.Trackable


class Saved(KerasSaveable, Trackable):
    """An object that Keras and TensorFlow save, and in it the attributes `_saved_attributes`."""

    @property
    def _saved_attributes(self) -> tuple[str, ...]:
        return ()

    def _obj_type(self) -> str:
        # Keras's list of kinds is closed. It makes an object of the kind and skips the attributes
        # that such an object has, too; a loss is made fast, an optimizer has variables.
        return "Loss"

    def __dir__(self) -> Iterable[str]:
        # Keras evaluates all attributes, and some properties of a clipper wait for the device.
        is_walked = sys._getframe(1).f_globals.get("__name__") == saving_lib.__name__
        return self._saved_attributes if is_walked else super().__dir__()


REDUCE_METHOD = "_all_reduce_sum_gradients"
"""The method of Keras's optimizers that is called once an update, with gradients that are
accumulated and unscaled, and returns their sum over the replicas."""


def check_reduce_method(optimizer_class: type) -> None:
    """Make sure that optimizers of this class sum their gradients where AutoClip expects it.

    Raises:
        RuntimeError: they do not; this version of Keras is not known.
    """
    for ancestor in optimizer_class.__mro__:
        update = vars(ancestor).get("_backend_update_step")
        if REDUCE_METHOD in getattr(getattr(update, "__code__", None), "co_names", ()):
            return
    raise RuntimeError(
        f"{optimizer_class.__name__} of Keras {keras.__version__} does not call {REDUCE_METHOD}, "
        "where AutoClip clips. Clip in a custom training loop, with clipper(grads_and_vars), "
        "or use a version of Keras that autoclip-tf was tested with; its documentation lists them."
    )


def check_backend() -> None:
    """Make sure that Keras runs on TensorFlow.

    Raises:
        TypeError: it runs on another backend.
    """
    backend = keras.config.backend()
    if backend == "tensorflow":
        return
    without = {
        "torch": (
            "On this backend clip in a custom train_step: clipper = "
            "autoclip.torch.QuantileClip([v.value for v in model.trainable_variables]) once, and "
            "clipper.step() between loss.backward() and optimizer.apply(gradients, variables)."
        ),
        "jax": (
            "For JAX there is no adapter yet; the documentation builds one on autoclip.core, in "
            '"Custom backends".'
        ),
    }
    raise TypeError(
        f"autoclip.tf clips gradients of TensorFlow, but Keras runs on the {backend!r} backend. "
        'Set the environment variable KERAS_BACKEND to "tensorflow" before Keras is imported. '
        + without.get(backend, "")
    )


def check_strategy(strategy: Any) -> None:
    """Make sure that a step under this strategy has one gradient, which all replicas see.

    Raises:
        RuntimeError: it has not, or it was not tried.
    """
    distribute = tf.distribute
    name = type(strategy).__name__
    if isinstance(strategy, distribute.ParameterServerStrategy):
        raise RuntimeError(
            f"AutoClip does not run under {name}: its workers update the variables one by one, "
            "without waiting for each other, so no step has a gradient of all of them. Use "
            "MirroredStrategy or MultiWorkerMirroredStrategy."
        )
    known = (
        distribute.MirroredStrategy,
        distribute.MultiWorkerMirroredStrategy,
        distribute.experimental.CentralStorageStrategy,
    )
    several = strategy.num_replicas_in_sync > 1
    if isinstance(strategy, distribute.TPUStrategy) or (
        several and not isinstance(strategy, known)
    ):
        raise RuntimeError(
            f"AutoClip has not been tested under {name}. Use MirroredStrategy or "
            "MultiWorkerMirroredStrategy."
        )


def compiled_by_xla() -> bool:
    """True if operations are traced for XLA now: `jit_compile=True`."""
    return not tf.executing_eagerly() and bool(
        GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    )


def retrace_models(optimizer: Any) -> None:
    """Let models that `optimizer` trains trace their steps again, as `compile` does.

    A graph that was traced before a clipper was attached does not call it. Keras keeps the graph
    in the model, and an optimizer does not know its models: they are searched among all objects.
    """
    for model in _models_with(getattr(optimizer, "_trainable_variables", ())):
        if model.train_function is not None:
            model.make_train_function(force=True)


def other_weights(variables: Sequence[Any]) -> list[Any]:
    """The other weights of the models that have some of these; those that are frozen, too."""
    own = {id(variable) for variable in variables}
    return [
        variable
        for model in _models_with(variables)
        for variable in model.weights
        if id(variable) not in own
    ]


def _models_with(variables: Sequence[Any]) -> list[Any]:
    """The models that train some of these variables, which know nothing of their models."""
    wanted = {id(variable) for variable in variables}
    return [
        found
        for found in (gc.get_objects() if wanted else ())
        # By its type: some proxies import their target when they are asked for __class__.
        if issubclass(type(found), keras.Model)
        and any(id(variable) in wanted for variable in getattr(found, "trainable_variables", ()))
    ]


def saving_for_inference() -> bool:
    """True while `tf.saved_model.save` runs, which traces the saving of its objects."""
    return bool(in_save_context())


def saving_for_orbax() -> bool:
    """True while Keras collects files for Orbax, which gets them and the variables Keras knows."""
    # Keras calls `save_assets` in the same way for its own files, which have the state already.
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_save_assets_to_dict":
            return True
    return False


def tf_variable(variable: Any) -> Any:
    """The `tf.Variable` in a Keras variable; a `tf.Variable` itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def variable_key(variable: Any) -> str:
    """The same for a Keras variable, its `tf.Variable`, and that one's copies on replicas."""
    variable = tf_variable(variable)
    # A distributed variable has no handle, and says so in an error, outside of a replica.
    if not isinstance(variable, tf.distribute.DistributedValues):
        # Where a copy, or the handle of one, knows of which distributed variable it is a part.
        for part in (variable, getattr(variable, "handle", None)):
            container = getattr(part, "_distributed_container", None)
            if container is not None:
                owner = container()
                variable = variable if owner is None else owner
                break
    return str(variable._unique_id)


def name_of(variable: Any) -> str:
    """The path of a variable in its model, or else its name."""
    return str(getattr(variable, "path", None) or variable.name.removesuffix(":0"))


def overwritten_by_gradient(variable: Any) -> bool:
    """True if Keras writes the gradient into the variable, as it does with the scales of float8."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def numerics_are_checked() -> bool:
    """True under `tf.debugging.enable_check_numerics`, which looks at each operation's output."""
    return bool(should_invoke_op_callbacks())


def to_host(values: Any) -> npt.NDArray[Any]:
    """The numbers of a tensor or a variable; waits for the device.

    Raises:
        RuntimeError: a graph is under construction, which has no numbers yet.
    """
    if not tf.executing_eagerly():
        raise RuntimeError(
            "AutoClip cannot read numbers while a tf.function is traced, such as Keras's "
            "train_step. Return tensors from it, such as clipper.total_norm, or read after it. In "
            "fit, AutoClipCallback logs the values."
        )
    array: npt.NDArray[Any] = values.numpy()
    return array


def build_scope(variables: Sequence[Any]) -> AbstractContextManager[Any]:
    """The scope of the strategy that the variables were made under, unless one is entered.

    Variables that are made outside of it would not be mirrored: each replica would record its norms
    in the same one.

    Raises:
        RuntimeError: the clipper cannot work under this strategy.
    """
    strategy = (
        getattr(tf_variable(variables[0]), "_distribute_strategy", None) if variables else None
    )
    if strategy is None or tf.distribute.has_strategy():
        check_strategy(tf.distribute.get_strategy())
        return nullcontext()
    check_strategy(strategy)
    return strategy.scope()


@contextmanager
def collected_variables() -> Iterator[list[tf.Variable]]:
    """The list that every variable made in the block is appended to."""
    variables: list[tf.Variable] = []

    def collect(make: Any, **arguments: Any) -> tf.Variable:
        # A tf.function that is being traced sees each variable that is made through it, and is
        # traced once more, even if the variable is lifted out of it.
        if tf.executing_eagerly() and not tf.distribute.has_strategy():
            make = ResourceVariable
        variables.append(make(**arguments))
        return variables[-1]

    with tf.variable_creator_scope(collect):
        yield variables
