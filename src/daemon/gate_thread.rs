//! What the gate's thread drives: the gate, and the first turn of each connection that it admits.

use std::sync::Arc;
use std::time::Duration;

use peergate::Wakeup;
use peergate::gate::{Admission, Driver, Gate, GateConfig};

use crate::first_turn::FirstTurn;
use crate::protocol::Protocol;
use crate::terms::Terms;

/// The running thread, as the main thread sees it.
pub type GateThread<P> = peergate::gate::GateThread<FirstTurns<P>>;

/// The gate with what comes after it.
pub struct FirstTurns<P: Protocol> {
    gate: Gate<Terms<P::Terms>>,
    first_turn: FirstTurn<P>,
    admitted: Vec<Admission<Terms<P::Terms>>>,
    /// Hears of each connection that is judged.
    wakeup: Arc<Wakeup>,
}

impl<P: Protocol> FirstTurns<P> {
    pub fn new(gate: Gate<Terms<P::Terms>>, first_turn: FirstTurn<P>, wakeup: Arc<Wakeup>) -> Self {
        Self { gate, first_turn, admitted: Vec::new(), wakeup }
    }

    /// Puts a configuration in force. When it returns, every connection that an earlier one admitted is in a worker's mailbox.
    pub fn configure(&mut self, config: GateConfig<Terms<P::Terms>>, settings: P::Settings) {
        self.first_turn.give_all();
        self.first_turn.settings = settings;
        self.gate.set_config(config);
    }

    fn serve(&mut self) {
        self.admitted.drain(..).for_each(|admission| self.first_turn.admit(admission));
    }
}

impl<P: Protocol> Driver for FirstTurns<P> {
    type Terms = Terms<P::Terms>;

    fn gate(&mut self) -> &mut Gate<Terms<P::Terms>> {
        &mut self.gate
    }

    fn turn(&mut self) {
        // While connections come close together, looking again costs less than sleeping.
        let timeout = self.first_turn.goes_on_looking().then_some(Duration::ZERO);
        if self.gate.turn(timeout, &mut self.admitted) {
            self.wakeup.notify();
        }
        self.serve();
    }

    fn stop_accepting(&mut self) {
        // A connection that came before the command is not left in the queue: of our own listeners it goes with them.
        self.gate.turn(Some(Duration::ZERO), &mut self.admitted);
        self.serve();
        self.gate.stop_accepting(&mut self.admitted);
        self.serve();
        self.first_turn.give_all_and_end();
    }

    fn into_gate(self) -> Gate<Terms<P::Terms>> {
        self.gate
    }
}
